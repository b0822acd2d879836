"""Compiles the C++ operators for CPUs: `python -m overlock.ops.build`."""

import os
import sys
import tempfile
from pathlib import Path

from overlock.ops.extension import NAME, SOURCES, compiler_flags, library_path


def build() -> Path:
    """Compiles the operators where that is not done yet, and returns the library's path.

    Compiling loads them too, which a process survives once: it is for one that does nothing else.

    Raises:
        RuntimeError: If there is no working C++ compiler or no ninja; what was there before stays.
        ImportError: If there is no setuptools.
    """
    path = library_path()
    if path.exists():
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
        os.replace(Path(folder) / f'{NAME}.so', path)
    return path


def main() -> int:
    """Compiles the operators and prints where they are; returns the exit status."""
    # ninja, which PyTorch compiles with, stands beside this Python, where PATH may not look.
    os.environ['PATH'] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get('PATH', '')))
    try:
        print(build())
    except (RuntimeError, OSError, ImportError) as error:
        print(f'the C++ operators were not compiled; all runs without them, slower on CPUs: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
