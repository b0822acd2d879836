"""Check this machine: versions, ContMix's backends, mmcv's operators, GPUs, folders; end with "ready" or with remedies.

Each backend of ContMix that can run is proved against the reference, forward and gradients, and timed at real shapes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlock import __version__

if TYPE_CHECKING:
    import torch

OLDEST_TORCH = (2, 6)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--quick', action='store_true', help='time nothing')


def run(quick: bool) -> int:
    remedies: list[str] = []
    for title, lines in (
        ('versions', versions(remedies)),
        ('devices', devices()),
        ('ContMix', backends(remedies, quick)),
        ('mmcv', mmcv_operators(remedies)),
        ('folders', folders(remedies)),
    ):
        print(title)
        for line in lines:
            print(f'  {line}', flush=True)
    print('\nready' if not remedies else '\nnot ready:\n' + '\n'.join(f'- {remedy}' for remedy in remedies))
    return int(bool(remedies))


def versions(remedies: list[str]) -> Iterator[str]:
    """Tell the versions of what the package is tested with, and which are outside the tested range."""
    import torch

    yield f'overlock {__version__}, Python {platform.python_version()}, {platform.platform()}'
    found = tuple(map(int, re.findall(r'\d+', torch.__version__)[:2]))
    yield f'torch {torch.__version__}'
    if found < OLDEST_TORCH:
        remedies.append(f'torch {torch.__version__} is too old; install {".".join(map(str, OLDEST_TORCH))} or newer')
    for name, wanted in requirements().items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f'{name}: not installed'
            continue
        fits = wanted.contains(version, prereleases=True)
        yield f'{name} {version}' + ('' if fits else f' (tested with {wanted})')
        if not fits:
            remedies.append(f"{name} {version} is outside of the tested {wanted}; run: pip install '{name}{wanted}'")


def requirements() -> dict[str, Any]:
    """Return the ranges of versions that the extras ask for, by package; none in a clone that is not installed."""
    try:
        from packaging.requirements import Requirement

        found = map(Requirement, importlib.metadata.requires('overlock') or [])
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    asked = {item.name: item for item in found if item.specifier and 'dev' not in str(item.marker)}
    return {name: item.specifier for name, item in asked.items() if name != 'setuptools'}


def devices() -> Iterator[str]:
    """Tell the processor and the GPUs."""
    import torch

    yield f'CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f'GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}'
    if torch.cuda.is_available():
        command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        told = shutil.which(command[0]) and subprocess.run(command, capture_output=True, text=True).stdout.strip()
        yield f'CUDA {torch.version.cuda}, driver {told.splitlines()[0] if told else "unknown: no nvidia-smi"}'
    else:
        yield 'GPU: none that torch can use'


def backends(remedies: list[str], quick: bool) -> Iterator[str]:
    """Prove each backend of ContMix that can run here, and time it."""
    import torch

    from overlock.ops.contmix.dispatch import FUSED, explain
    from overlock.ops.contmix.proof import LIMITS, deviation

    names = ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]
    for backend, reason in explain().items():
        if reason != 'available':
            yield f'{backend}: {reason}'
            if FUSED['cpu'] == backend and 'python -m overlock.ops.build' in reason:
                remedies.append('ContMix is slow on CPUs until its operator is compiled: python -m overlock.ops.build')
            continue
        for device in names:
            if backend in FUSED.values() and FUSED[device] != backend or backend == 'natten' and device == 'cuda':
                continue
            dtypes = [torch.float32] if device == 'cpu' else [torch.float32, torch.float16, torch.bfloat16]
            for dtype in dtypes:
                found = deviation(backend, device, dtype)
                name = f'{backend} on {device}, {str(dtype).removeprefix("torch.")}'
                right = found <= LIMITS[dtype]
                timed = '' if quick or backend == 'reference' or not right else times(backend, device, dtype)
                yield f'{name}: {"right" if right else "WRONG"}, deviation {found:.1e}{timed}'
                if not right:
                    remedies.append(
                        f'{name} deviates from the reference by {found:.1e}, at most {LIMITS[dtype]:.0e} is right; set '
                        "contmix_backend='eager' in the backbone, and report this output"
                    )


def times(backend: str, device: str, dtype: torch.dtype) -> str:
    """Return the times of ContMix at stride 16 of an image of 800x1344: forward, and forward with backward."""
    import torch

    from overlock import ARCHS, contmix
    from overlock.ops.contmix.proof import make_inputs

    texts = []
    for name in ('xt', 's'):
        arch = ARCHS[name]
        groups, sizes = arch.focus_groups[0], (arch.small_kernel_size, arch.dynamic_kernel_sizes[0])
        depth = arch.embed_dims[2] // (2 * groups)
        tensors, options = make_inputs(
            device, dtype, batch=1, groups=groups, depth=depth, kernel_sizes=sizes, size=(50, 84)
        )

        def step(train: bool, tensors: Any = tensors, options: Any = options) -> None:
            with torch.set_grad_enabled(train), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                out = contmix(*(tensor.requires_grad_() for tensor in tensors), **options, backend=backend)
            if train:
                torch.autograd.grad(out.sum(), tensors)

        alone, both = (_seconds(partial(step, train), device) * 1e3 for train in (False, True))
        texts.append(f'; {name}: {alone:.2f} ms, with gradients {both:.2f} ms')
    return ''.join(texts)


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Return the shortest of five calls after a first one."""
    import torch

    found = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device == 'cuda':
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def mmcv_operators(remedies: list[str]) -> Iterator[str]:
    """Prove mmcv's operators by a call on each device."""
    import torch

    remedy = 'compile mmcv for this torch: run `make setup` in the repository'
    for device in ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]:
        try:
            from mmcv.ops import nms

            boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]], device=device)
            kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)[1].tolist()
        # A module of operators for another torch fails in many ways.
        except Exception as error:
            yield f'{device}: {type(error).__name__}: {str(error).partition(chr(10))[0]}'
            if not (isinstance(error, ModuleNotFoundError) and error.name == 'mmcv'):
                remedies.append(f"mmcv's operators do not run on {device}; {remedy}")
            continue
        yield f'{device}: {"right" if kept == [0, 2] else "WRONG"}'
        if kept != [0, 2]:
            remedies.append(f"mmcv's nms is wrong on {device}; {remedy}")


def folders(remedies: list[str]) -> Iterator[str]:
    """Tell where weights and caches are, and which of these folders cannot be written."""
    import torch

    from overlock.ops.build import library_path
    from overlock.utils.configs import ROOT

    yield f'configurations: {ROOT / "configs"}'
    if place := os.environ.get('OVERLOCK_WEIGHTS'):
        yield f'weights, first: {place} (OVERLOCK_WEIGHTS)'
    places = {'weights': Path(torch.hub.get_dir(), 'checkpoints'), 'compiled operators': library_path().parent}
    for name, folder in places.items():
        yield f'{name}: {folder}'
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(above, os.W_OK):
            remedies.append(
                f'{above}, for {name}, cannot be written; set TORCH_HOME or OVERLOCK_CACHE to another folder'
            )
