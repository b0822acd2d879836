"""The C++ operators for CPUs: `python -m overlock.ops.extension` compiles them, `load` finds them again.

Nothing is compiled at import, and nothing needs the operators to be there.
"""

import hashlib
import os
import platform
import sys
import tempfile
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
        return False, 'not compiled for this PyTorch and processor; `python -m overlock.ops.extension` does it'
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return False, f'{path} does not load ({error}); remove it and compile anew: `python -m overlock.ops.extension`'
    return True, ''


def build() -> Path:
    """Compiles the operators where that is not done yet, and returns the library's path.

    Raises:
        RuntimeError: If there is no working C++ compiler or no ninja; what was there before stays.
    """
    path = library_path()
    if path.exists():
        return path
    from torch.utils import cpp_extension  # takes a second to import
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # -Wno-psabi: vectors are passed between inlined functions only, so no caller cares about their convention.
        flags = ['-O3', '-fopenmp', '-Wno-psabi', *FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])]
        cpp_extension.load(NAME, [str(source) for source in SOURCES], extra_cflags=flags, is_python_module=False,
                           build_directory=folder)
        os.replace(Path(folder) / f'{NAME}.so', path)
    return path


def main() -> int:
    """Compiles the operators and prints where they are; returns the exit status."""
    # ninja, which PyTorch compiles with, stands beside this Python, where PATH may not look.
    os.environ['PATH'] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get('PATH', '')))
    try:
        print(build())
    except (RuntimeError, OSError) as error:
        print(f'the C++ operators were not compiled; all runs without them, slower on CPUs: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
