"""The C++ operators for CPUs: `python -m overlock.ops.build` compiles them, `load` loads what it compiled.

Importing overlock compiles nothing, and nothing needs the operators to be there.
"""

import hashlib
import os
import platform
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from overlock.utils.files import keep_hash, kept_hash, sha256_of

NAME = 'overlock_cpu'
SOURCES = sorted(Path(__file__).parent.rglob('*.cpp'))
HEADERS = sorted(Path(__file__).parent.rglob('*.h'))
# -Wno-psabi: vectors are passed between inlined functions only, so their calling convention does not matter.
FLAGS = ['-O3', '-fopenmp', '-Wno-psabi']
# By PyTorch's name for the processor; what -march=native makes may not run on an older machine that shares the folder.
INSTRUCTIONS = {'AVX512': ['-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq', '-mfma'], 'AVX2': ['-mavx2', '-mfma']}


def compiler_flags() -> list[str]:
    """Return the flags for this processor."""
    return FLAGS + INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])


def library_path() -> Path:
    """Return the path of the library for this PyTorch, Python, processor, source and flags.

    Raises:
        RuntimeError: If the user has no home folder and no environment variable names a cache folder.
    """
    folder = os.environ.get('OVERLOCK_CACHE') or Path(
        os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'overlock'
    )
    content = b''.join(path.read_bytes() for path in SOURCES + HEADERS) + repr(compiler_flags()).encode()
    build = (
        f'torch{torch.__version__}',
        sys.implementation.cache_tag,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability().replace(' ', ''),
        hashlib.sha256(content).hexdigest()[:12],
    )
    return Path(folder).expanduser() / 'extensions' / '-'.join(map(str, build)) / f'{NAME}.so'


@cache
def load() -> str:
    """Load the operators as `torch.ops.overlock_cpu`. Return '', or why that is not possible."""
    try:
        path = library_path()
        if not path.exists():
            return 'not compiled for this PyTorch and processor; `python -m overlock.ops.build` does it'
        if not _is_whole(path):
            return f'{path} is not what was compiled; compile it anew: `python -m overlock.ops.build`'
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f'it does not load ({error}); compile it anew: `python -m overlock.ops.build`'
    return ''


def _is_whole(path: Path) -> bool:
    """Return whether a library is the compiled one: a cut one would end the process when it is loaded or called."""
    return path.is_file() and kept_hash(path) == sha256_of(path)


def build() -> Path:
    """Compile the operators unless that was done before, and return the path of the library.

    This also loads them, which a process can do only once, so call it in a process of its own.

    Raises:
        RuntimeError: If there is no working C++ compiler or no ninja; earlier files stay as they are.
        ImportError: If there is no setuptools.
    """
    path = library_path()
    if _is_whole(path):
        return path
    from torch.utils import cpp_extension  # needs setuptools

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        cpp_extension.load(
            NAME,
            [str(source) for source in SOURCES],
            extra_cflags=compiler_flags(),
            is_python_module=False,
            build_directory=folder,
        )
        library = Path(folder) / f'{NAME}.so'
        keep_hash(path, sha256_of(library))
        os.replace(library, path)
    return path


def main() -> int:
    """Compile the operators, print their path and return the exit status."""
    # PyTorch calls ninja, which is installed beside this Python, a folder that PATH may not name.
    os.environ['PATH'] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get('PATH', '')))
    try:
        print(build())
    except (RuntimeError, OSError, ImportError) as error:
        print(f'the C++ operators were not compiled; all runs without them, slower on CPUs: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
