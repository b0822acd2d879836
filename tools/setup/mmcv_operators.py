"""Compile mmcv's operators for the torch of this Python, prove them by a call, keep the wheel in the user's cache."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils import cpp_extension

PROOF = """
import sys, mmcv, torch, torchvision
from mmcv.ops import get_compiling_cuda_version, nms
cuda = sys.argv[2] != 'cpu'
assert mmcv.__version__ == sys.argv[1], f'expected mmcv {sys.argv[1]}, got {mmcv.__version__}'
assert not cuda or get_compiling_cuda_version() != 'not available', 'expected CUDA operators, got those for the CPU'
for device in ['cpu', 'cuda'] if cuda and torch.cuda.is_available() else ['cpu']:
    boxes = torch.tensor([[0., 0., 10., 10.], [1., 1., 10., 10.], [20., 20., 30., 30.]], device=device)
    kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)[1].tolist()
    assert kept == [0, 2], f'expected nms on {device} to keep boxes 0 and 2, got {kept}'
"""


def choose_target(environ: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return what to compile for, 'cpu' or CUDA's version and GPUs, and the variables of that build."""
    forced, memory = environ.get('FORCE_CUDA'), os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    jobs = environ.get('MAX_JOBS') or str(max(1, min(len(os.sched_getaffinity(0)), memory // 2**31)))
    variables = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs}
    # mmcv's setup.py compiles for CUDA whenever torch sees a GPU, nvcc or not: hiding it is the only way to refuse.
    cpu = 'cpu', {**variables, 'FORCE_CUDA': '0', 'CUDA_VISIBLE_DEVICES': ''}
    seen = {'{}.{}'.format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    if forced == '0' or not (seen or forced == '1'):
        return cpu
    home, wanted = cpp_extension.CUDA_HOME, torch.version.cuda or 'none'
    nvcc = shutil.which(f'{home}/bin/nvcc')
    text = subprocess.run([nvcc, '--version'], capture_output=True, text=True).stdout if nvcc else ''
    found = ''.join(re.findall(r'release (\d+\.\d+)', text)) or 'not there'
    gpus = environ.get('TORCH_CUDA_ARCH_LIST') or ' '.join(sorted(seen))
    if gpus and found.split('.')[0] == wanted.split('.')[0]:
        headers = [str(path) for path in sorted(Path(torch.__path__[0]).parent.glob('nvidia/*/include'))]
        path = os.pathsep.join([*headers, *filter(None, [environ.get('CPATH')])])
        key = f'cu{found}-sm{re.sub("[^0-9A-Za-z+]+", "_", gpus.replace(".", ""))}'
        return key, {**variables, 'FORCE_CUDA': '1', 'CUDA_HOME': str(home), 'CPATH': path}
    obstacle = f'nvcc (PATH, CUDA_HOME) is {found}, torch is of CUDA {wanted}, TORCH_CUDA_ARCH_LIST is {gpus or "none"}'
    if forced == '1':
        sys.exit(f"FORCE_CUDA=1 asks for mmcv's CUDA operators, but {obstacle}")
    print(f"note: mmcv's operators will run on the CPU only: {obstacle}", flush=True)
    return cpu


def succeeds(command: list[str], variables: Mapping[str, str] | None = None) -> bool:
    """Run a command with these variables added and return whether it succeeded."""
    return subprocess.run(command, env={**os.environ, **(variables or {})}).returncode == 0


def precompile(folder: Path) -> str:
    """Precompile torch's header, which is most of the work of each file; return the option that uses it."""
    header = folder / 'torch.h'
    # gcc takes it for the flags that it was made with and else reads the header itself; Clang would stop.
    header.write_text('#ifdef __clang__\n#error only for gcc\n#endif\n#include <torch/types.h>\n')
    flags = f'{os.environ.get("CXXFLAGS") or sysconfig.get_config_var("CFLAGS")} {sysconfig.get_config_var("CCSHARED")}'
    folders = [f'-I{path}' for path in (*cpp_extension.include_paths(), sysconfig.get_path('include'))]
    command = [*shlex.split(f'{os.environ.get("CXX") or "c++"} {flags} -g0 -std=c++17 -x c++-header'), *folders]
    return f'-include {shlex.quote(str(header))}' if succeeds([*command, str(header), '-o', f'{header}.gch']) else ''


def build(pin: Path, variables: Mapping[str, str], folder: Path) -> Path:
    """Compile mmcv from its source package and return the wheel, which is kept in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.build-') as scratch:
        # CPPFLAGS come behind Python's own flags, whose debugging symbols take half of the time.
        flags = f'{os.environ.get("CPPFLAGS", "")} -g0 {precompile(Path(scratch))}'
        # pip's own cache does not know torch's version and would hand back operators of another torch.
        options = ['--no-deps', '--no-build-isolation', '--no-cache-dir', '--no-binary', 'mmcv', '--require-hashes']
        command = [sys.executable, '-m', 'pip', 'wheel', '-v', *options, '-r', str(pin), '-w', scratch]
        if not succeeds(command, {**variables, 'CPPFLAGS': flags}):
            sys.exit('mmcv could not be compiled')
        wheel = next(Path(scratch).glob('*.whl'))
        return wheel.replace(folder / wheel.name)


def set_up(pin: Path, environ: Mapping[str, str]) -> None:
    """Install the mmcv of a requirement file with operators that work: those there, a kept wheel's, or new ones."""
    key, variables = choose_target(environ)
    version = pin.read_text().split()[0].partition('==')[2]
    cache = environ.get('OVERLOCK_CACHE') or f'{environ.get("XDG_CACHE_HOME") or "~/.cache"}/overlock'
    tag = 'cp{}{}-{}'.format(*sys.version_info[:2], sysconfig.get_platform())
    folder = Path(cache).expanduser().absolute() / f'wheels/mmcv{version}-torch{torch.__version__}-{key}-{tag}'
    proof = [sys.executable, '-c', PROOF, version, key]
    install = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--force-reinstall']
    # A kept wheel that is damaged or does not work is compiled anew.
    if succeeds(proof) or any(succeeds([*install, str(path)]) and succeeds(proof) for path in folder.glob('*.whl')):
        return
    if not (succeeds([*install, str(build(pin, variables, folder))]) and succeeds(proof)):
        sys.exit(f'mmcv {version} was compiled, but its operators do not work with torch {torch.__version__}')


if __name__ == '__main__':
    try:
        set_up(Path(sys.argv[1]), os.environ)
    except OSError as error:
        sys.exit(f'{error}: OVERLOCK_CACHE names another folder for compiled wheels')
