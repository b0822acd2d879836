"""Compiles natten 0.17.5, the last release with `na2d_av`, into the environment of the Python that runs this."""

import os
import subprocess
import sys
from pathlib import Path

from setup_console import Console, SetupError
from setup_interpreter import pip_install, probe_surely
from setup_mmcv import check_compiler, default_jobs

NATTEN = '0.17.5'
PROOF = "from overlock.ops import explain; reason = explain()['natten']; exit(reason != 'available' and reason)"


def main() -> int:
    """Compiles natten unless it works already; returns the exit status."""
    prefix = Path(sys.prefix)
    if not subprocess.run([sys.executable, '-c', PROOF], capture_output=True).returncode:
        print('natten works already')
        return 0
    try:
        interpreter = probe_surely(sys.executable)
        check_compiler(interpreter, os.environ)
        console = Console(prefix / 'overlock-natten.log')
        console.note(f'compiling natten {NATTEN}, which takes minutes; log: {console.log}')
        console.run(pip_install(interpreter, 'cmake', 'ninja', 'wheel'))
        # Its set-up calls cmake by name; pip's own cache does not know for which torch a wheel was built.
        path = os.pathsep.join((str(prefix / 'bin'), os.environ.get('PATH', '')))
        options = ('--no-build-isolation', '--no-deps', '--no-cache-dir')
        console.run(
            pip_install(interpreter, *options, f'natten=={NATTEN}'),
            {'PATH': path, 'NATTEN_N_WORKERS': str(default_jobs())},
        )
        subprocess.run([sys.executable, '-c', PROOF], check=True)
    except SetupError as error:
        print(f'setup: {error}', file=sys.stderr)
        return 1
    except subprocess.CalledProcessError:
        print(f'setup: natten {NATTEN} was compiled but does not run here, for the reason above', file=sys.stderr)
        return 1
    print('natten works')
    return 0


if __name__ == '__main__':
    sys.exit(main())
