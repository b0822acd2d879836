"""What the Triton operators for GPUs share: whether they run here."""

import importlib.metadata
import importlib.util
import os
import shutil
from functools import cache

import torch
from torch import Tensor

# The first that multiplies float64.
OLDEST = (3, 5)


def why_no_triton() -> str:
    """Return '' if Triton is installed and has a GPU, or its interpreter, to run on, else the reason why not."""
    missing = _missing()
    if missing or interpreted():
        return missing
    if torch.version.hip or not torch.cuda.is_available():
        return 'no CUDA device'
    if not _has_compiler():
        return 'Triton needs a C compiler, and there is no gcc, clang or cc; install one or set CC'
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f'CUDA capability {capability[0]}.{capability[1]} is below 8.0'
    return ''


def why_not_on_gpu(x: Tensor) -> str:
    """Return '' if a map is on a CUDA device, or the interpreter runs, else the reason why not."""
    device = x.device.type
    return '' if device == 'cuda' or interpreted() else f'it runs on CUDA devices and the maps are on {device}'


@cache
def _missing() -> str:
    """Return what is wrong with the installed Triton, or '', without importing it."""
    if importlib.util.find_spec('triton') is None:
        return 'triton is not installed'
    # Nightly builds of torch come with it under another name.
    installed = [name for name in ('triton', 'pytorch-triton') if any(importlib.metadata.distributions(name=name))]
    version = importlib.metadata.version(installed[0]) if installed else ''
    if version and tuple(int(part) for part in version.split('.')[:2]) < OLDEST:
        return f'triton {version} is older than {OLDEST[0]}.{OLDEST[1]}'
    return ''


# Kept: the layers of a network ask at every step.
@cache
def _has_compiler() -> bool:
    return bool(os.environ.get('CC')) or any(map(shutil.which, ('gcc', 'clang', 'cc')))


def interpreted() -> bool:
    """Return whether the environment asks for Triton's interpreter, which runs kernels on tensors of the CPU."""
    return os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'on', 'yes', 'y')
