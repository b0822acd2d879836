"""mmcv's operators: compiled from source against the installed torch, kept in the user's cache, proved by a call."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from setup_console import Console, SetupError, excerpt
from setup_interpreter import PIP_FLAGS, Interpreter, pip_install

MMCV = '2.1.0'

PROOF = """
import sys, torch, torchvision
from mmcv.ops import get_compiling_cuda_version, nms
boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 10., 10.], [20., 20., 30., 30.]])
scores = torch.tensor([0.9, 0.8, 0.7])
devices = ['cpu']
if sys.argv[1] == 'cuda':
    if get_compiling_cuda_version() == 'not available':
        sys.exit('the operators were compiled for the CPU only, CUDA was expected')
    devices += ['cuda'] if torch.cuda.is_available() else []
for device in devices:
    kept = nms(boxes.to(device), scores.to(device), 0.5)[1].tolist()
    if kept != [0, 2]:
        sys.exit(f'nms on {device} kept boxes {kept}, expected [0, 2]')
"""

GPUS = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps(sorted({'{}.{}'.format(*torch.cuda.get_device_capability(i)) for i in range(count)})))
"""


@dataclass(frozen=True)
class OpsPlan:
    """How mmcv's operators are compiled here.

    Attributes:
        target: 'cpu' or 'cuda'.
        key: The target's part of the wheel's key: 'cpu', or CUDA version and GPU architectures.
        variables: Environment variables of the build.
        note: What the user should know, '' for nothing.
    """

    target: str
    key: str
    variables: Mapping[str, str]
    note: str = ''


def check_compiler(interpreter: Interpreter, environ: Mapping[str, str], which: Callable = shutil.which) -> None:
    """Raises `SetupError` where a C or C++ compiler or Python's headers are missing."""
    tools = [shlex.split(environ.get(name) or default)[0] for name, default in (('CC', 'gcc'), ('CXX', 'c++'))]
    missing = [tool for tool in tools if not which(tool)]
    if missing:
        raise SetupError(
            "mmcv's operators are compiled here, which needs a C and a C++ compiler, and "
            f'{" and ".join(missing)} was not found: install GCC (Debian and Ubuntu: '
            '`apt install build-essential`; Fedora: `dnf install gcc gcc-c++ make`) or set CC and CXX'
        )
    header = Path(interpreter.include) / 'Python.h'
    if not header.exists():
        package = f'python{interpreter.version[0]}.{interpreter.version[1]}-dev'
        raise SetupError(
            f"mmcv's operators are compiled here, which needs Python's headers, and {header} is missing: "
            f'install them (Debian and Ubuntu: `apt install {package}`)'
        )


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Returns the folder that keeps compiled wheels between checkouts."""
    if environ.get('OVERLOCK_CACHE'):
        return Path(environ['OVERLOCK_CACHE']).expanduser().absolute()
    return Path(environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'overlock'


def wheel_folder(cache: Path, interpreter: Interpreter, plan: OpsPlan) -> Path:
    """Returns the cache entry of a wheel: it is good for this mmcv, torch, CUDA, Python and platform and no other."""
    tag = f'cp{interpreter.version[0]}{interpreter.version[1]}'
    return cache / 'wheels' / f'mmcv{MMCV}-torch{interpreter.torch}-{plan.key}-{tag}-{interpreter.platform}'


def whole_wheel(folder: Path) -> Path | None:
    """Returns the folder's wheel if it is undamaged and holds the operators, else None."""
    for path in sorted(folder.glob('mmcv-*.whl')):
        try:
            with zipfile.ZipFile(path) as wheel:
                if wheel.testzip() is None and any(name.startswith('mmcv/_ext') for name in wheel.namelist()):
                    return path
        # zipfile raises any of these on damaged bytes, by where the damage is.
        except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error):
            continue
    return None


def find_nvcc(environ: Mapping[str, str], which: Callable = shutil.which) -> tuple[str, str] | None:
    """Returns the CUDA toolkit's folder and version, such as '13.0', None without a working nvcc."""
    home = environ.get('CUDA_HOME') or environ.get('CUDA_PATH')
    nvcc = which(os.path.join(home, 'bin', 'nvcc') if home else 'nvcc')
    if not nvcc:
        return None
    release = re.search(r'release (\d+\.\d+)', _output([nvcc, '--version']))
    # On PATH there may be a wrapper outside the toolkit, beside which torch would look for the headers in vain.
    here = re.search(r'_HERE_=(.+)', _output([nvcc, '--dryrun', '-x', 'cu', '-c', os.devnull, '-o', os.devnull]))
    home = home or str(Path(here[1] if here else os.path.dirname(nvcc)).parent)
    return (home, release[1]) if release else None


def _output(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def visible_gpus(interpreter: Interpreter) -> list[str]:
    """Returns the compute capabilities of the GPUs that torch sees, such as ['9.0']."""
    if interpreter.torch_cuda is None:
        return []
    done = subprocess.run([interpreter.python, '-c', GPUS], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else []


def plan_ops(
    interpreter: Interpreter, gpus: list[str], nvcc: tuple[str, str] | None, environ: Mapping[str, str]
) -> OpsPlan:
    """Decides between CPU and CUDA operators and gives the build its environment variables.

    Args:
        interpreter: The environment, torch in it.
        gpus: Compute capabilities of the visible GPUs.
        nvcc: The CUDA toolkit's folder and version, if there is one.
        environ: The user's variables; FORCE_CUDA=1 asks for CUDA without a GPU, 0 for the CPU in any case.

    Returns:
        The plan.

    Raises:
        SetupError: If FORCE_CUDA=1 asks for what cannot be compiled here.
    """
    forced = environ.get('FORCE_CUDA', '')
    jobs = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': environ.get('MAX_JOBS') or str(default_jobs())}
    # mmcv's setup.py compiles for CUDA whenever torch sees a GPU, nvcc or not: hiding it is the only way to refuse.
    cpu = OpsPlan('cpu', 'cpu', {**jobs, 'FORCE_CUDA': '0', 'CUDA_VISIBLE_DEVICES': ''})
    if forced == '0' or not (gpus or forced == '1'):
        return cpu
    architectures = environ.get('TORCH_CUDA_ARCH_LIST') or ' '.join(gpus)
    obstacle = ''
    if interpreter.torch_cuda is None:
        obstacle = f'torch {interpreter.torch} is built for the CPU'
    elif nvcc is None:
        obstacle = f'nvcc was not found on PATH or in CUDA_HOME; torch needs that of CUDA {interpreter.torch_cuda}'
    elif nvcc[1].split('.')[0] != interpreter.torch_cuda.split('.')[0]:
        obstacle = f'{nvcc[0]} is of CUDA {nvcc[1]}, torch {interpreter.torch} of CUDA {interpreter.torch_cuda}'
    elif not architectures:
        obstacle = 'no GPU is visible to compile for; name one, as in TORCH_CUDA_ARCH_LIST=9.0'
    if obstacle and forced == '1':
        raise SetupError(f"FORCE_CUDA=1 asks for mmcv's CUDA operators, but {obstacle}")
    if obstacle:
        return OpsPlan('cpu', 'cpu', cpu.variables, f"mmcv's operators will run on the CPU only: {obstacle}")
    headers = [str(path) for path in sorted(Path(interpreter.site).glob('nvidia/*/include'))]
    paths = os.pathsep.join([*headers, *filter(None, [environ.get('CPATH')])])
    key = f'cu{nvcc[1]}-sm{re.sub("[^0-9A-Za-z+]+", "_", architectures.replace(".", ""))}'
    return OpsPlan('cuda', key, {**jobs, 'FORCE_CUDA': '1', 'CUDA_HOME': nvcc[0], 'CPATH': paths})


def default_jobs() -> int:
    """Returns how many compilers may run at once: one a core, as far as 2 GiB of memory each allow."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


def build_wheel(interpreter: Interpreter, plan: OpsPlan, folder: Path, console: Console) -> Path:
    """Compiles mmcv from its source package and puts the wheel into its cache entry.

    pip's own cache is left out: it does not know torch's version and would hand back operators of another torch.

    Raises:
        SetupError: If the compilation fails, or yields no operators, or the cache cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix='.build-')
    except OSError as error:
        raise SetupError(
            f'{folder} cannot be written ({error.strerror}): set OVERLOCK_CACHE to a folder that can'
        ) from None
    with scratch:
        console.run(
            [
                interpreter.python,
                '-m',
                'pip',
                'wheel',
                *PIP_FLAGS,
                '-v',
                '--no-deps',
                '--no-build-isolation',
                '--no-cache-dir',
                '--no-binary',
                'mmcv',
                '-w',
                scratch.name,
                f'mmcv=={MMCV}',
            ],
            plan.variables,
        )
        built = whole_wheel(Path(scratch.name))
        if built is None:
            raise SetupError(f'mmcv {MMCV} was built without its operators; {console.log} tells why')
        os.replace(built, folder / built.name)
        return folder / built.name


def prove_ops(interpreter: Interpreter, target: str) -> str:
    """Imports mmcv's operators and calls one; returns '' if its result is right, else what went wrong."""
    done = subprocess.run([interpreter.python, '-c', PROOF, target], capture_output=True, text=True)
    return '' if done.returncode == 0 else (done.stderr.strip() or f'exit status {done.returncode}')


def install_mmcv(
    interpreter: Interpreter,
    plan: OpsPlan,
    folder: Path,
    console: Console,
    environ: Mapping[str, str],
    prove: Callable[[Interpreter, str], str] = prove_ops,
) -> None:
    """Installs mmcv with operators that fit the environment's torch, compiled here or earlier; keeps one that works.

    Raises:
        SetupError: If the operators do not work in the end.
    """
    if interpreter.mmcv == MMCV and not prove(interpreter, plan.target):
        console.note(f'mmcv {MMCV} is there and its operators work')
        return
    wheel = whole_wheel(folder)
    if wheel:
        console.note(f'compiled earlier: {wheel}')
    else:
        check_compiler(interpreter, environ)
        console.note(f'compiling {plan.variables["MAX_JOBS"]} files at a time, which takes minutes; log: {console.log}')
        wheel = build_wheel(interpreter, plan, folder, console)
        console.note(f'kept for other checkouts: {wheel}')
    console.run(pip_install(interpreter, '--no-deps', '--force-reinstall', str(wheel)))
    problem = prove(interpreter, plan.target)
    if problem:
        raise SetupError(
            f'mmcv {MMCV} is installed, but its operators do not work with torch {interpreter.torch} and torchvision '
            f'{interpreter.torchvision} on {interpreter.name}:\n{excerpt(problem.splitlines())}\n'
            f'Remove {folder} and run again to compile them anew; the complete log is {console.log}.'
        )
