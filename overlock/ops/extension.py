"""The C++ operators for CPUs: `python -m overlock.ops.build` compiles them, `load` finds them again.

Nothing is compiled at import, and nothing needs the operators to be there.
"""

import hashlib
import os
import platform
import sys
from functools import cache
from pathlib import Path

import torch

NAME = 'overlock_cpu'
SOURCES = sorted(Path(__file__).parent.rglob('*.cpp'))
# -Wno-psabi: vectors are passed between inlined functions only, so that no caller cares about their convention.
FLAGS = ['-O3', '-fopenmp', '-Wno-psabi']
# By PyTorch's name for what the processor has; -march=native would not run on an older machine that shares the folder.
INSTRUCTIONS = {'AVX512': ['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mfma'], 'AVX2': ['-mavx2', '-mfma']}


def compiler_flags() -> list[str]:
    """Flags for this processor."""
    return FLAGS + INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])


def library_path() -> Path:
    """Where the library is that fits this PyTorch, Python, processor, source and flags."""
    environ = os.environ
    cache_folder = Path(
        environ.get('OVERLOCK_CACHE') or Path(environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'overlock'
    ).expanduser()
    content = b''.join(path.read_bytes() for path in SOURCES) + repr(compiler_flags()).encode()
    source = hashlib.sha256(content).hexdigest()[:12]
    build = '-'.join(
        (
            f'torch{torch.__version__}',
            sys.implementation.cache_tag,
            platform.machine(),
            torch.backends.cpu.get_cpu_capability().replace(' ', ''),
            source,
        )
    )
    return cache_folder / 'extensions' / build / f'{NAME}.so'


@cache
def load() -> tuple[bool, str]:
    """Loads the operators as `torch.ops.overlock_cpu`; (False, why not) where they are not there."""
    try:
        path = library_path()
        if not path.exists():
            return False, 'not compiled for this PyTorch and processor; `python -m overlock.ops.build` does it'
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home, where a container has no name for the user
        return False, f'it does not load ({error}); compile it anew: `python -m overlock.ops.build`'
    return True, ''
