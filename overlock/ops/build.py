"""Compiles the C++ operators for CPUs: `python -m overlock.ops.build`."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

from overlock.ops.extension import FLAGS, NAME, SOURCES, library_path


def build() -> Path:
    """Compiles the operators where that is not done yet, and returns the library's path.

    Raises:
        RuntimeError: If there is no working C++ compiler or no ninja; what was there before stays.
    """
    path = library_path()
    if path.exists():
        return path
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
