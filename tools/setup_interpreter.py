"""What a Python and its environment hold, found without importing any of it."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setup_console import SetupError

PIP_FLAGS = ('--disable-pip-version-check', '--no-input')

# torch's own metadata lacks the local part (+cu130, +cpu) that its operators depend on; importing torch takes seconds.
PROBE = """
import importlib.metadata, importlib.util, json, pathlib, re, sys, sysconfig
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
torch, cuda, site = version('torch'), None, sysconfig.get_path('purelib')
spec = importlib.util.find_spec('torch') if torch else None
file = pathlib.Path(spec.origin).with_name('version.py') if spec and spec.origin else None
if file and file.exists():
    found = dict(re.findall(r"^(__version__|cuda)\\b.*= '(.*)'", file.read_text(), re.M))
    torch, cuda, site = found.get('__version__', torch), found.get('cuda'), str(file.parents[1])
else:
    torch = None
print(json.dumps(dict(
    python=sys.executable, version=sys.version_info[:3], platform=sysconfig.get_platform(), site=site,
    include=sysconfig.get_path('include'), torch=torch, torch_cuda=cuda, torchvision=version('torchvision'),
    mmcv=version('mmcv'), cv2=importlib.util.find_spec('cv2') is not None)))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python and what its environment holds.

    Attributes:
        python: Path of the executable.
        version: Such as (3, 11, 7).
        platform: Such as 'linux-x86_64'.
        site: The site-packages folder that holds torch.
        include: Folder of Python.h.
        torch: Full version such as '2.11.0+cu130', None without torch.
        torch_cuda: The CUDA version torch was built for, None for a CPU build.
        torchvision: Version or None.
        mmcv: Version or None.
        cv2: Whether some distribution of OpenCV is there.
    """

    python: str
    version: tuple[int, int, int]
    platform: str
    site: str
    include: str
    torch: str | None = None
    torch_cuda: str | None = None
    torchvision: str | None = None
    mmcv: str | None = None
    cv2: bool = False

    @property
    def name(self) -> str:
        """The version in words, such as 'Python 3.11.7'."""
        return f'Python {".".join(map(str, self.version))}'


def probe(python: str | Path) -> Interpreter | None:
    """Returns what the environment of this Python holds, None if it does not run."""
    try:
        done = subprocess.run([str(python), '-c', PROBE], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    fields = json.loads(done.stdout)
    return Interpreter(**{**fields, 'version': tuple(fields['version'])})


def probe_surely(python: str | Path) -> Interpreter:
    """Returns what the environment of this Python holds; raises `SetupError` if it does not run."""
    found = probe(python)
    if found is None:
        raise SetupError(f'{python} does not run: remove its environment and run again')
    return found


def pip_install(interpreter: Interpreter, *arguments: str) -> list[str]:
    """Returns the command that installs into the environment."""
    # Byte-compiling all of torch takes longer than what is ever imported of it.
    flags = (*PIP_FLAGS, '--progress-bar', 'off', '--no-compile')
    return [interpreter.python, '-m', 'pip', 'install', *flags, *arguments]
