"""Set up the environment of `make`: the tested packages, mmcv's operators, this package. Starts with a bare Python.

The next run continues an interrupted set-up; a stamp tells that one is finished. Variables: OVERLOCK_CACHE (folder of
compiled wheels), FORCE_CUDA (1: compile CUDA operators without a visible GPU; 0: never), TORCH_CUDA_ARCH_LIST,
CUDA_HOME, MAX_JOBS, CC, CXX.
"""

import sys


# Stands above the imports, unannotated: an older Python must get as far as this sentence.
def check_python(version, python):
    """Exit with a message unless this version of Python is supported."""
    if not (3, 10) <= tuple(version[:2]) <= (3, 12):
        got = f'{".".join(map(str, version[:3]))} ({python}): name another, as in `PYTHON=python3.11 make test`'
        sys.exit(f'setup: Python 3.10, 3.11 or 3.12 is needed, got {got}')


check_python(sys.version_info, sys.executable)

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

from console import SetupError, run

ROOT = Path(__file__).resolve().parents[2]
# Imports nothing of what it finds. torch's metadata lacks the local part of its version, on which operators depend.
PROBE = """
import json, pathlib, runpy, sys, sysconfig
from importlib.metadata import distributions
from importlib.util import find_spec
torch = find_spec('torch')
facts = runpy.run_path(str(pathlib.Path(torch.origin).with_name('version.py'))) if torch and torch.origin else {}
urls = filter(None, (package.read_text('direct_url.json') for package in distributions(name='overlock')))
print(json.dumps(dict(
    python=sys.executable, version=sys.version_info[:3], headers=sysconfig.get_path('include'),
    torch=facts.get('__version__'), overlock=next((json.loads(url)['url'] for url in urls), None),
    has={name: find_spec(name) is not None for name in ('pip', 'cv2', 'mmcv')})))
"""


def probe(python: str | Path) -> SimpleNamespace:
    """Return what the environment of this Python holds; raise `SetupError` if it does not run."""
    try:
        # Elsewhere than in the checkout: `-c` puts the current folder on the path.
        done = subprocess.run([str(python), '-c', PROBE], cwd='/', capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f'{python} does not run ({error}): remove its environment and run again') from None
    return SimpleNamespace(**json.loads(done.stdout))


def stamp(root: Path, found: SimpleNamespace, environ: Mapping[str, str]) -> str:
    """Return a digest of all that decides what the set-up installs."""
    patterns = ('requirements/*', 'tools/setup/*.py', 'setup.cfg', 'pyproject.toml', 'overlock/**/*.cpp')
    files = sorted(path for pattern in patterns for path in root.glob(pattern))
    packages = sorted(path.parent.name for path in root.glob('*overlock*/__init__.py'))
    facts = (str(root), packages, found.version, found.torch, environ.get('FORCE_CUDA'))
    return hashlib.sha256(repr(facts).encode() + b''.join(path.read_bytes() for path in files)).hexdigest()


def is_set_up(venv: Path, root: Path, environ: Mapping[str, str]) -> bool:
    """Return whether `venv` holds a finished set-up of the same requirements for its current torch."""
    with contextlib.suppress(OSError, SetupError):
        return (venv / 'overlock-stamp').read_text() == stamp(root, probe(venv / 'bin/python'), environ)
    return False


def check_compiler(headers: Path, environ: Mapping[str, str]) -> None:
    """Raise `SetupError` where a C or C++ compiler or Python's headers are missing."""
    tools = [shlex.split(environ.get(name) or default)[0] for name, default in (('CC', 'gcc'), ('CXX', 'c++'))]
    missing = [name for name in (*tools, f'{headers}/Python.h') if not shutil.which(name, os.F_OK)]
    if missing:
        raise SetupError(
            f"mmcv's operators are compiled here, and {' and '.join(missing)} was not found: install GCC and Python's "
            f'headers (Debian and Ubuntu: `apt install build-essential {headers.name}-dev`) or set CC and CXX'
        )


def create(venv: Path, own: bool, log: Path) -> SimpleNamespace:
    """Return what `venv` holds, pip at least; create the environment, or complete a half-made one, first."""
    python = venv / 'bin/python'
    try:
        found = probe(python)
    except SetupError:
        if not own and any(not path.name.startswith('overlock-') for path in venv.iterdir()):
            raise SetupError(f'{venv} is no working environment: name another folder by VENV=, or remove it') from None
        shutil.rmtree(venv / 'bin', ignore_errors=True)
        run([sys.executable, '-m', 'venv', str(venv)], log)
        found = probe(python)
    check_python(found.version, python)
    if not own and found.torch and tuple(map(int, re.findall(r'\d+', found.torch)[:2])) < (2, 6):
        raise SetupError(f'torch >= 2.6 is needed, got {found.torch} in {venv}: upgrade it there, or leave VENV out')
    if not found.has['pip']:
        run([found.python, '-m', 'ensurepip'], log)
    return found


def pins(root: Path, venv: Path, *names: str) -> str:
    """Write the lock's entries of these packages, or of all but mmcv, into a file; return its path."""
    entries = re.findall(r'^(([\w.-]+)==.*\n(?: .*\n)*)', (root / 'requirements/lock.txt').read_text(), re.M)
    path = venv / 'overlock-pins.txt'
    path.write_text(''.join(text for text, name in entries if (name in names if names else name != 'mmcv')))
    return str(path)


def install_packages(found: SimpleNamespace, root: Path, venv: Path, tested: bool, log: Path) -> None:
    """Install everything but mmcv: the tested set, or what the user's own torch still lacks."""
    pip, hashed = [found.python, '-m', 'pip', 'install'], ['--no-deps', '--require-hashes', '-r']
    if tested:
        run([*pip, *hashed, pins(root, venv, 'uv')], log)
        run([found.python, *'-m uv pip install --python'.split(), found.python, *hashed, pins(root, venv)], log)
        return
    # Without the local part (+cu130), which the metadata that pip compares with may lack.
    torch = f'torch=={found.torch.partition("+")[0]}'
    run([*pip, torch, '-r', f'{root}/requirements/runtime.txt', '-r', f'{root}/requirements/dev.txt'], log)
    names = ['mmengine', 'mmdet', 'mmsegmentation', *([] if found.has['cv2'] else ['opencv-python-headless'])]
    run([*pip, *hashed, pins(root, venv, *names)], log)


def set_up(venv: Path, root: Path, environ: Mapping[str, str]) -> None:
    """Complete an environment from whatever state it is in; raise `SetupError` if that fails."""
    log, own, marker = venv / 'overlock-setup.log', venv == root / '.venv', venv / 'overlock-tested'
    log.write_text('')
    print(f'[1/4] environment {venv}; log: {log}', flush=True)
    found = create(venv, own, log)
    if not found.has['mmcv']:
        check_compiler(Path(found.headers), environ)
    if own or not found.torch:
        marker.touch()
    print(f'[2/4] {"the tested" if marker.exists() else f"torch {found.torch} stays; other"} packages', flush=True)
    install_packages(found, root, venv, marker.exists(), log)
    print("[3/4] mmcv's operators; compiling them, where that was not done before, takes minutes", flush=True)
    script = [found.python, str(root / 'tools/setup/mmcv_operators.py'), pins(root, venv, 'mmcv')]
    for note in re.findall('^note: .*', run(script, log), re.M):
        print(f'    {note}', flush=True)
    elsewhere = found.overlock not in (None, root.as_uri())
    print(f'[4/4] this package{f", but {found.overlock} stays installed" if elsewhere else ""}', flush=True)
    if not elsewhere:
        run([found.python, *'-m pip install --no-deps --no-build-isolation -e'.split(), str(root)], log)
    try:
        run([found.python, '-m', 'overlock.ops.build'], log, {'PYTHONPATH': str(root)})
    except SetupError as error:
        print(f'    note: its optional operators for this CPU could not be compiled: {error}', flush=True)
    (venv / 'overlock-stamp').write_text(stamp(root, probe(found.python), environ))


def main(venv: Path) -> None:
    """Set up the environment in this folder where it is not set up yet."""
    # Byte-compiling all of torch takes longer than what is ever imported of it.
    os.environ.update(PIP_DISABLE_PIP_VERSION_CHECK='1', PIP_NO_INPUT='1', PIP_NO_COMPILE='1')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    venv.mkdir(parents=True, exist_ok=True)
    try:
        with open(venv / 'overlock-lock', 'w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_set_up(venv, ROOT, os.environ):
                set_up(venv, ROOT, os.environ)
        print(f'{venv} is set up', flush=True)
    except (SetupError, KeyboardInterrupt) as error:
        sys.exit(f'setup: {str(error) or "interrupted; the next run continues"}')


if __name__ == '__main__':
    main(Path(*sys.argv[1:] or ['.venv']).expanduser().absolute())
