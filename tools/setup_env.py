"""Sets up the environment that `make demo` and `make test` run in: torch, OpenMMLab, mmcv's operators, this package.

Runs with a bare Python 3.10 to 3.12 and its standard library. What is there already is left as it is: an interrupted
set-up is continued by the next run, and a finished one is recognized by a stamp in the environment.

mmcv's operators are compiled against the torch of the environment. The wheel is kept in
`${OVERLOCK_CACHE:-${XDG_CACHE_HOME:-~/.cache}/overlock}/wheels/<mmcv, torch, CUDA, Python and platform>/`.

Variables: OVERLOCK_CACHE (cache folder), FORCE_CUDA (1: compile the CUDA operators without a visible GPU; 0: never),
TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CC, CXX.
"""

import sys

OLDEST, NEWEST = (3, 10), (3, 12)


# Stands above the imports, unannotated: an older Python must get as far as this sentence.
def python_refusal(version, python):
    """Returns the sentence that refuses a Python of this version, '' for an accepted one."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return ''
    return (
        'Python 3.10, 3.11 or 3.12 is needed, got {} ({}): install one of them and name it, '
        'as in `PYTHON=python3.11 make test`'.format('.'.join(map(str, version[:3])), python)
    )


if __name__ == '__main__' and python_refusal(sys.version_info, sys.executable):
    sys.exit('setup: ' + python_refusal(sys.version_info, sys.executable))

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from setup_console import Console, SetupError
from setup_interpreter import Interpreter, pip_install, probe, probe_surely
from setup_mmcv import MMCV, cache_folder, check_compiler, find_nvcc, install_mmcv, plan_ops, visible_gpus, wheel_folder

OLDEST_TORCH = (2, 4)
STAMP, LOCK, LOG = 'overlock-setup.json', 'overlock-setup.lock', 'overlock-setup.log'


def stamp_key(root: Path, interpreter: Interpreter) -> str:
    """Returns a digest of all that decides what the set-up installs."""
    digest = hashlib.sha256()
    for path in sorted(
        [
            *root.glob('requirements/*.txt'),
            *root.glob('tools/setup_*.py'),
            root / 'setup.cfg',
            root / 'pyproject.toml',
            *root.glob('overlock/ops/**/*.cpp'),
            *root.glob('overlock/ops/build.py'),
        ]
    ):
        digest.update(f'{path.name}\n'.encode() + path.read_bytes())
    packages = sorted(path.parent.name for path in root.glob('*overlock*/__init__.py'))
    digest.update(repr((str(root), packages, interpreter.version, interpreter.torch)).encode())
    return digest.hexdigest()


def is_set_up(venv: Path, root: Path, environ: Mapping[str, str]) -> bool:
    """Tells whether a finished set-up of the same requirements is in `venv`, for the torch that is there now."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
        interpreter = probe(venv / 'bin/python')
        asks_more = environ.get('FORCE_CUDA') == '1' and stamp['target'] != 'cuda'
        return interpreter is not None and stamp['key'] == stamp_key(root, interpreter) and not asks_more
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_stamp(venv: Path, key: str, target: str) -> None:
    """Records a finished set-up, whole or not at all."""
    part = venv / f'{STAMP}.part'
    part.write_text(json.dumps({'key': key, 'target': target}))
    os.replace(part, venv / STAMP)


def create_environment(venv: Path, own: bool, console: Console) -> Interpreter:
    """Returns the environment's interpreter; creates the environment, or completes a half-made one, first.

    Args:
        venv: Folder of the environment.
        own: Whether it is the checkout's own `.venv`, which may be made anew; any other is only added to.
        console: Runs the commands.

    Raises:
        SetupError: If `venv` is a folder but no environment, or of a Python that is not accepted.
    """
    python = str(venv / 'bin/python')
    found = probe(python)
    rest = [path for path in venv.iterdir() if path.name not in (STAMP, LOCK, LOG)]
    if found is None:
        if rest and not own:
            raise SetupError(
                f'{venv} exists, but its bin/python does not run: name another folder with VENV=, or remove this one'
            )
        for path in rest:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        # pip comes next, by itself, so that an environment left without it is completed by the same lines.
        console.run([sys.executable, '-m', 'venv', '--without-pip', str(venv)])
        found = probe_surely(python)
    refusal = python_refusal(found.version, python)
    if refusal:
        raise SetupError(refusal)
    if subprocess.run([python, '-m', 'pip', '--version'], capture_output=True).returncode:
        try:
            console.run([python, '-m', 'ensurepip', '--upgrade', '--default-pip'])
        except SetupError as error:
            package = f'python{found.version[0]}.{found.version[1]}-venv'
            raise SetupError(f'{error}\nOn Debian and Ubuntu `apt install {package}` brings ensurepip.') from None
    if found.version[:2] != sys.version_info[:2]:
        console.note(
            f'{venv} has {found.name} and keeps it, though this is Python {sys.version.split()[0]}: '
            '`make clean` first, or another VENV=, changes that'
        )
    return found


def keeps_torch(interpreter: Interpreter, own: bool) -> bool:
    """Tells whether the environment's torch stays: one of the user's does, from 2.4 on.

    Raises:
        SetupError: If the user's environment has an older torch.
    """
    if own or interpreter.torch is None:
        return False
    found = tuple(int(part) for part in re.findall(r'\d+', interpreter.torch)[:2])
    if found < OLDEST_TORCH:
        raise SetupError(
            f'torch >= 2.4 is needed, got {interpreter.torch} in the environment of {interpreter.python}: '
            'upgrade torch there, or leave VENV out for an environment with the tested one'
        )
    return True


def install_libraries(interpreter: Interpreter, root: Path, own: bool, console: Console) -> None:
    """Installs everything but torch and mmcv; the torch and torchvision there are named to pip, so that they stay."""
    folder = root / 'requirements'
    # Without the local part (+cu130): the metadata that pip compares with may lack it.
    kept = [
        f'{name}=={version.partition("+")[0]}'
        for name, version in (('torch', interpreter.torch), ('torchvision', interpreter.torchvision))
        if version
    ]
    files = [part for name in ('build', 'runtime', 'dev') for part in ('-r', str(folder / f'{name}.txt'))]
    if own or not interpreter.cv2:
        files += ['-r', str(folder / 'opencv.txt')]
    console.run(pip_install(interpreter, *files, *kept))
    console.run(pip_install(interpreter, '--no-deps', '-r', str(folder / 'openmmlab.txt')))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one set-up of an environment run at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'another set-up of {path.parent} is running: waiting for it', flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(venv: Path, root: Path, environ: Mapping[str, str], console: Console) -> None:
    """Brings an environment from wherever it is to complete.

    Args:
        venv: Folder of the environment; `root/.venv` is the checkout's own.
        root: The checkout.
        environ: The user's variables.
        console: Runs the commands.

    Raises:
        SetupError: With what stopped it.
    """
    own = venv == root / '.venv'
    found = probe(venv / 'bin/python') or probe_surely(sys.executable)
    if found.torch is None or found.mmcv is None:
        check_compiler(found, environ)
    with console.step(f'environment {venv}'):
        interpreter = create_environment(venv, own, console)
    with console.step('torch and torchvision'):
        if keeps_torch(interpreter, own):
            console.note(f'torch {interpreter.torch} is there and stays')
        else:
            console.run(pip_install(interpreter, '-r', str(root / 'requirements/torch.txt')))
    interpreter = probe_surely(interpreter.python)
    with console.step('libraries'):
        install_libraries(interpreter, root, own, console)
    interpreter = probe_surely(interpreter.python)
    with console.step(f"mmcv {MMCV}'s operators for torch {interpreter.torch}"):
        plan = plan_ops(interpreter, visible_gpus(interpreter), find_nvcc(environ), environ)
        if plan.note:
            console.note(plan.note)
        install_mmcv(interpreter, plan, wheel_folder(cache_folder(environ), interpreter, plan), console, environ)
    with console.step('this package'):
        console.run(pip_install(interpreter, '--no-deps', '--no-build-isolation', '-e', str(root)))
    with console.step('operators for this CPU'):
        try:
            console.run([interpreter.python, '-m', 'overlock.ops.build'])
        except SetupError as error:
            console.note(f'they are optional and could not be compiled: {error}')
    write_stamp(venv, stamp_key(root, interpreter), plan.target)


def main(arguments: list[str] | None = None) -> int:
    """Sets up the environment where it is not set up yet; returns the exit status."""
    parser = argparse.ArgumentParser(description='Sets up the environment for make demo and make test.')
    parser.add_argument('--venv', default='.venv', help='folder of the environment (default: .venv)')
    venv = Path(parser.parse_args(arguments).venv).expanduser().absolute()
    root = Path(__file__).resolve().parents[1]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if not is_set_up(venv, root, os.environ):
            with locked(venv / LOCK):
                if not is_set_up(venv, root, os.environ):
                    set_up(venv, root, os.environ, Console(venv / LOG))
        print(f'{venv} is set up', flush=True)
    except SetupError as error:
        print(f'setup: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print('\nsetup: interrupted; the next run goes on from here', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
