"""Check this machine: versions, operators, mmcv's operators, GPUs, folders; end with "ready" or with remedies.

Each backend of ContMix and of dilated branches that can run is proved against the reference, forward and gradients, and
timed at real shapes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overlock import __version__

if TYPE_CHECKING:
    import torch

OLDEST_TORCH = (2, 6)
# In no extra, see setup.cfg; mmdet and mmseg refuse others.
MMCV = '>=2.1,<2.2'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--quick', action='store_true', help='time nothing')


def run(quick: bool) -> int:
    remedies: list[str] = []
    for title, lines in (
        ('versions', versions(remedies)),
        ('devices', devices(remedies)),
        ('ContMix', backends(remedies, quick)),
        ('dilated branches in training', dilated_branches(remedies, quick)),
        ('feed-forward part', feed_forward_part(remedies)),
        ('mmcv', mmcv_operators(remedies)),
        ('folders', folders(remedies)),
    ):
        print(title)
        for line in lines:
            print(f'  {line}', flush=True)
    print('\nready' if not remedies else '\nnot ready:\n' + '\n'.join(f'- {remedy}' for remedy in remedies))
    return int(bool(remedies))


def versions(remedies: list[str]) -> Iterator[str]:
    """Tell the versions of what the package is tested with, and which are outside the tested range."""
    import torch

    yield f'overlock {__version__}, Python {platform.python_version()}, {platform.platform()}'
    found = tuple(map(int, re.findall(r'\d+', torch.__version__)[:2]))
    yield f'torch {torch.__version__}'
    if found < OLDEST_TORCH:
        remedies.append(f'torch {torch.__version__} is too old; install {".".join(map(str, OLDEST_TORCH))} or newer')
    for name, wanted in _requirements().items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f'{name}: not installed'
            continue
        fits = wanted.contains(version, prereleases=True)
        yield f'{name} {version}' + ('' if fits else f' (tested with {wanted})')
        if not fits:
            remedies.append(f"{name} {version} is outside of the tested {wanted}; run: pip install '{name}{wanted}'")


def _requirements() -> dict[str, Any]:
    """Return the ranges of versions that the extras ask for, by package; mmcv's alone in a clone, not installed."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return {}
    try:
        found = importlib.metadata.requires('overlock') or []
    except importlib.metadata.PackageNotFoundError:
        found = []
    asked = {item.name: item for item in map(Requirement, [f'mmcv{MMCV}', *found])}
    return {
        name: item.specifier
        for name, item in asked.items()
        if item.specifier and 'dev' not in str(item.marker) and name != 'setuptools'
    }


def devices(remedies: list[str]) -> Iterator[str]:
    """Tell the processor and the GPUs, and whether torch can use them."""
    import torch

    yield f'CPU: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads'
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield f'GPU {index}: {device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}'
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    asked = subprocess.run(command, capture_output=True, text=True) if shutil.which(command[0]) else None
    driver = asked.stdout.partition('\n')[0] if asked and not asked.returncode else ''
    if torch.cuda.is_available():
        yield f'CUDA {torch.version.cuda}, driver {driver or "unknown: no nvidia-smi"}'
        return
    yield 'GPU: none that torch can use' + (f', driver {driver}' if driver else '')
    if driver:
        remedies.append(
            f'there is a GPU with driver {driver}, and torch {torch.__version__} cannot use it; install a torch for a '
            'CUDA that this driver has, see https://pytorch.org, and look at CUDA_VISIBLE_DEVICES'
        )


def backends(remedies: list[str], quick: bool) -> Iterator[str]:
    """Prove each backend of ContMix that can run here, and time it."""
    from overlock.ops.contmix.dispatch import FUSED, explain
    from overlock.ops.contmix.proof import deviation

    measured: dict[tuple[str, str, torch.dtype], dict[str, tuple[float, float]]] = {}
    for backend, reason in explain().items():
        if reason != 'available':
            yield f'{backend}: {reason}'
            if FUSED['cpu'] == backend and 'python -m overlock.ops.build' in reason:
                remedies.append('ContMix is slow on CPUs until its operator is compiled: python -m overlock.ops.build')
            continue
        for device in _devices():
            if backend in FUSED.values() and FUSED[device] != backend or backend == 'natten' and device == 'cuda':
                continue
            for dtype in _dtypes(device):
                name = f'{backend} on {device}, {str(dtype).removeprefix("torch.")}'
                instead = 'reinstall torch' if backend in ('reference', 'eager') else '`auto` takes eager instead'
                right, told = _proved(name, partial(deviation, backend, device, dtype), dtype, instead, remedies)
                if not right:
                    yield told
                    continue
                timed = {} if quick or backend == 'reference' else times(backend, device, dtype)
                measured[backend, device, dtype] = timed
                yield told + ''.join(
                    f'; {key}: {alone:.2f} ms, with gradients {both:.2f} ms' for key, (alone, both) in timed.items()
                )
                slower = measured.get(('eager', device, dtype), {})
                if backend in FUSED.values() and any(timed[key] > slower[key] for key in slower if key in timed):
                    remedies.append(
                        f"{name} is slower than eager here; set contmix_backend='eager' in the backbone, and report "
                        'this output'
                    )


def _devices() -> list[str]:
    import torch

    return ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]


def _dtypes(device: str) -> list[torch.dtype]:
    """Return the dtypes that operators are proved in."""
    import torch

    return [torch.float32] if device == 'cpu' else [torch.float32, torch.float16, torch.bfloat16]


def _proved(
    name: str, deviation: Callable[[], float], dtype: torch.dtype, instead: str, remedies: list[str]
) -> tuple[bool, str]:
    """Return whether the deviation of a call is that of a right one, and the line that tells it."""
    from overlock.ops.proof import LIMITS

    try:
        found = deviation()
    # A compiler of kernels fails in many ways.
    except Exception as error:
        told = f'fails with {type(error).__name__}: {str(error).partition(chr(10))[0]}'
    else:
        if found <= LIMITS[dtype]:
            return True, f'{name}: right, deviation {found:.1e}'
        told = f'deviates from the reference by {found:.1e}'
    remedies.append(f'{name} {told}, at most {LIMITS[dtype]:.0e} is right; {instead}, and report this output')
    return False, f'{name}: WRONG, {told}'


def dilated_branches(remedies: list[str], quick: bool) -> Iterator[str]:
    """Prove the operator of the dilated branches on each device, and time a step of it beside one branch at a time."""
    import torch

    from overlock.layers.large_kernel import BRANCHES
    from overlock.ops.dilated import BACKENDS, EAGER_ASKED
    from overlock.ops.dilated_proof import deviation, make_inputs, step

    if EAGER_ASKED:
        yield 'not used: OVERLOCK_DILATED=eager'
    for device in _devices():
        backend = BACKENDS[device]
        if reason := backend.why_unsupported(torch.zeros(1, 1, 1, 1, device=device)):
            yield f'{backend.NAME}: {reason}'
            continue
        for dtype in _dtypes(device):
            name = f'{backend.NAME} on {device}, {str(dtype).removeprefix("torch.")}'
            instead = 'the branches run one by one instead'
            right, told = _proved(name, partial(deviation, backend.NAME, device, dtype), dtype, instead, remedies)
            if right and not quick:
                branches = ((13, 1), *BRANCHES[13])
                tensors = make_inputs(device, dtype, batch=1, channels=64, size=(64, 64), branches=branches)
                fused, eager = (_seconds(partial(step, tensors, branches, on), device) * 1e3 for on in (True, False))
                told += f'; a step of 1x64x64x64 takes {fused:.2f} ms, one by one {eager:.2f} ms'
            yield told


def feed_forward_part(remedies: list[str]) -> Iterator[str]:
    """Prove the operator of the feed-forward part on the CPU."""
    import torch

    from overlock.ops.compiled import why_not_compiled
    from overlock.ops.feed_forward_proof import deviation

    if reason := why_not_compiled():
        yield f'cpp: {reason}'
        return
    call = partial(deviation, 'cpp', torch.float32)
    yield _proved('cpp on cpu, float32', call, torch.float32, 'its layers run one by one instead', remedies)[1]


def times(backend: str, device: str, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Return milliseconds of ContMix at stride 16 of 800x1344: forward, and with backward, of the variants XT and S."""
    import torch

    from overlock import ARCHS, contmix
    from overlock.ops.contmix.proof import make_inputs

    found = {}
    for name in ('xt', 's'):
        arch = ARCHS[name]
        groups, sizes = arch.focus_groups[0], (arch.small_kernel_size, arch.dynamic_kernel_sizes[0])
        depth = arch.embed_dims[2] // (2 * groups)
        tensors, options = make_inputs(
            device, dtype, batch=1, groups=groups, depth=depth, kernel_sizes=sizes, size=(50, 84)
        )

        def step(train: bool, tensors: Any = tensors, options: Any = options) -> None:
            with torch.set_grad_enabled(train), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                out = contmix(*(tensor.requires_grad_() for tensor in tensors), **options, backend=backend)
            if train:
                torch.autograd.grad(out.sum(), tensors)

        alone, both = (_seconds(partial(step, train), device) * 1e3 for train in (False, True))
        found[name] = alone, both
    return found


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Return the shortest of five calls after a first one."""
    import torch

    found = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device == 'cuda':
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found[1:])


def mmcv_operators(remedies: list[str]) -> Iterator[str]:
    """Prove mmcv's operators by a call on each device."""
    import torch

    remedy = 'compile mmcv for this torch: run `make setup` in the repository'
    for device in ['cpu', *(['cuda'] if torch.cuda.is_available() else [])]:
        try:
            from mmcv.ops import nms, roi_align

            boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]], device=device)
            kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7], device=device), 0.5)[1].tolist()
            # Of a slope, the mean over a box is the value at its middle.
            slope = torch.arange(16.0, device=device).expand(1, 1, 16, 16).contiguous()
            middle = roi_align(slope, torch.tensor([[0.0, 2, 2, 6, 8]], device=device), 1, 1.0, 2, 'avg', True)
            right = kept == [0, 2] and abs(float(middle) - 3.5) < 1e-4
        # A module of operators for another torch fails in many ways.
        except Exception as error:
            yield f'{device}: {type(error).__name__}: {str(error).partition(chr(10))[0]}'
            if not (isinstance(error, ModuleNotFoundError) and error.name == 'mmcv'):
                remedies.append(f"mmcv's operators do not run on {device}; {remedy}")
            continue
        yield f'{device}: nms and roi_align {"right" if right else "WRONG"}'
        if not right:
            remedies.append(f"mmcv's operators are wrong on {device}; {remedy}")


def folders(remedies: list[str]) -> Iterator[str]:
    """Tell where weights and caches are, and which of these folders cannot be written."""
    import torch

    from overlock.ops.build import library_path
    from overlock.utils.configs import ROOT

    yield f'configurations: {ROOT / "configs"}'
    if place := os.environ.get('OVERLOCK_WEIGHTS'):
        yield f'weights, first: {place} (OVERLOCK_WEIGHTS)'
    places = {'weights': Path(torch.hub.get_dir(), 'checkpoints'), 'compiled operators': library_path().parent}
    if torch.cuda.is_available():
        places["Triton's kernels"] = Path(os.environ.get('TRITON_CACHE_DIR') or Path.home() / '.triton/cache')
    for name, folder in places.items():
        yield f'{name}: {folder}'
        above = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(above, os.W_OK):
            remedies.append(
                f'{above}, for {name}, cannot be written; set TORCH_HOME, OVERLOCK_CACHE or TRITON_CACHE_DIR to '
                'another folder'
            )
