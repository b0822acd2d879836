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
# Instruction sets by PyTorch's name for what the processor has; -march=native would not run on an older machine that
# shares the folder.
FLAGS = {'AVX512': ['-march=x86-64-v4'], 'AVX2': ['-march=x86-64-v3']}


def library_path() -> Path:
    """Where the library is that fits this PyTorch, Python, processor and source."""
    environ = os.environ
    cache_folder = Path(environ.get('OVERLOCK_CACHE') or
                        Path(environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'overlock').expanduser()
    source = hashlib.sha256(b''.join(path.read_bytes() for path in SOURCES)).hexdigest()[:12]
    build = '-'.join((f'torch{torch.__version__}', sys.implementation.cache_tag, platform.machine(),
                      torch.backends.cpu.get_cpu_capability().replace(' ', ''), source))
    return cache_folder / 'extensions' / build / f'{NAME}.so'


@cache
def load() -> tuple[bool, str]:
    """Loads the operators as `torch.ops.overlock_cpu`; (False, why not) where they are not there."""
    path = library_path()
    if not path.exists():
        return False, 'not compiled for this PyTorch and processor; `python -m overlock.ops.build` does it'
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return False, f'{path} does not load ({error}); remove it and compile anew: `python -m overlock.ops.build`'
    return True, ''
