#!/usr/bin/env python
"""Measure time and memory of ContMix alone, at the network's real shapes, in every backend that can run here.

Each backend runs in a process of its own; they take turns. First its output and gradients are compared with those of
the `reference` backend in float64 on the same inputs: a backend that deviates gets no speed.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.record import ARCHS, make_parser, show, size, write_result
from benchmarks.rounds import Worker, compute_truth, deviation, is_timed, is_within, measure
from overlock import contmix, get_arch
from overlock.models.blocks import NUM_REGIONS
from overlock.ops import explain

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# Relative to the largest magnitude of the output, and to the norm of each gradient.
TOLERANCES = {'fp32': 1e-5, 'bf16': 5e-2, 'fp16': 1e-2}
MODES = {'forward': {'train': False}, 'train': {'train': True}}
# The authors' steps on natten's kernel or on an unfold; not backends of ours.
PIPELINES = {'published': published.aggregate_natten, 'unfold': published.aggregate_unfold}
# The only build of natten that a recent torch imports is for CPUs; Triton's interpreter there is for tests.
ONLY_ON = {'cpp': 'cpu', 'natten': 'cpu', 'published': 'cpu', 'triton': 'cuda'}
# For the reference, which makes every window in float64, and a few tensors of that size in its backward pass.
REFERENCE_BYTES = 4 * 2**30


@dataclass
class OperatorCase:
    """One call of ContMix as the network makes it; see `benchmarks.rounds`.

    Attributes:
        backend: One of `overlock.ops.contmix.BACKENDS` or of `PIPELINES`, or 'module:function' with a function that
            takes the arguments of `overlock.contmix` but for `backend`.
        channels: C of the value map.
        groups: G.
        kernel_sizes: k and K.
        size: Height and width of the map.
        batch: Number of maps.
        dtype: 'fp32', 'bf16' or 'fp16', of query, key and value; the parameters are float32, under autocast.
        device: 'cpu' or 'cuda'.
        exact: Whether to compute in float64, on inputs rounded to `dtype`.
    """

    backend: str
    channels: int
    groups: int
    kernel_sizes: tuple[int, int]
    size: tuple[int, int]
    batch: int
    dtype: str
    device: torch.device
    exact: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        scale = (self.channels / self.groups) ** -0.5
        self.function = partial(pick(self.backend), kernel_sizes=self.kernel_sizes, num_groups=self.groups, scale=scale)
        self.inputs = self._make_inputs(self.size)

    def run(self, size: tuple[int, int] | None = None, train: bool = True) -> dict[str, Tensor]:
        """Run one call, on a map of another size if given, and with `train` its backward pass."""
        *inputs, grad = self._make_inputs(size) if size else self.inputs
        narrow = self.dtype != 'fp32' and not self.exact
        with torch.inference_mode(not train):
            with torch.autocast(self.device.type, DTYPES[self.dtype]) if narrow else nullcontext():
                out = self.function(*inputs)
        if not train:
            return {'output': out}
        gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype))
        return {'output': out.detach()} | {f'gradient {i}': gradient for i, gradient in enumerate(gradients)}

    def _make_inputs(self, size: tuple[int, int]) -> list[Tensor]:
        """Return query, key, value, weight, bias, rpb_small and rpb_large, and the gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        half, taps = self.channels // 2, sum(kernel**2 for kernel in self.kernel_sizes)
        shapes = [
            (self.batch, half, *size),
            (self.batch, half, NUM_REGIONS, NUM_REGIONS),
            (self.batch, 2 * half, *size),
            (taps, NUM_REGIONS**2),
            (taps,),
            *((self.groups, 2 * kernel - 1, 2 * kernel - 1) for kernel in self.kernel_sizes),
            (self.batch, 2 * half, *size),
        ]
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        tensors[3] /= NUM_REGIONS
        # As in the network: on CPUs ours runs in channels_last, the published pipeline never does.
        ours = self.device.type == 'cpu' and self.backend not in PIPELINES
        layout = torch.channels_last if ours else torch.contiguous_format
        for index in (0, 1, 2, 7):
            tensors[index] = tensors[index].to(DTYPES[self.dtype]).contiguous(memory_format=layout)
        tensors = [tensor.to(self.device, torch.float64 if self.exact else tensor.dtype) for tensor in tensors]
        return [tensor.requires_grad_(index < 7) for index, tensor in enumerate(tensors)]


def pick(backend: str) -> Callable[..., Tensor]:
    """Return the function of a backend, a pipeline, or 'module:function'."""
    if backend in PIPELINES:
        return partial(published.contmix, aggregate=PIPELINES[backend])
    if ':' in backend:
        module, _, function = backend.partition(':')
        return getattr(importlib.import_module(module), function)
    return partial(contmix, backend=backend)


class Gate:
    """Compare backends with the reference in float64 on the same inputs, on a smaller map if that is too large."""

    def __init__(self, task: dict[str, Any], threads: int | None) -> None:
        self.threads, self.dtype, self.size = threads, task['dtype'], check_map(task)
        self.task = {**task, 'size': self.size, 'backend': 'reference', 'exact': True}

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Return the output and gradients of the reference."""
        return compute_truth(OperatorCase, self.task, self.threads)

    def __call__(self, name: str, worker: Worker) -> dict[str, Any]:
        found = deviation(worker.results(size=self.size), self.truth)
        limits = dict.fromkeys(('output', 'gradient'), TOLERANCES[self.dtype])
        return {'passed': is_within(found, limits), 'deviation': found, 'limit': limits, 'map': list(self.size)}


def check_map(task: dict[str, Any]) -> tuple[int, int]:
    """Return the measured map, or the largest of half, a quarter, ... its sides that the reference has memory for."""
    height, width = task['size']
    kernel = task['kernel_sizes'][1]
    # Eight bytes, half the channels; about four such tensors at once.
    per_pixel = 4 * 8 * task['batch'] * task['channels'] // 2 * kernel**2
    while height * width * per_pixel > REFERENCE_BYTES and min(height, width) >= 2 * kernel:
        height, width = height // 2, width // 2
    return height, width


def shape_of(arch: str, stage: int, image: tuple[int, int]) -> dict[str, Any]:
    """Return channels, groups, kernel sizes and map of the calls at stride 16 (stage 3) or 32 (stage 4)."""
    shape = get_arch(arch)
    kernel, stride = shape.dynamic_kernel_sizes[stage - 3], 2 ** (stage + 1)
    return {
        'channels': shape.embed_dims[stage - 1],
        'groups': shape.focus_groups[stage - 3],
        'kernel_sizes': (shape.small_kernel_size, kernel),
        # The network enlarges maps that are smaller than the kernel.
        'size': tuple(max(kernel, -(-side // stride)) for side in image),
    }


def missing(device: str) -> dict[str, str]:
    """Return all backends and pipelines by name, with '' or the reason why one is not measured on a device."""
    reasons = {name: '' if reason == 'available' else reason for name, reason in explain().items()}
    reasons = {'published': reasons['natten'], 'unfold': '', **reasons}
    reasons['reference'] = 'slow by design; the others are compared with it'
    for name, only in ONLY_ON.items():
        reasons[name] = reasons[name] or ('' if device.startswith(only) else f'for {only} alone')
    return reasons


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--arch', nargs='+', default=['xt', 's'], choices=ARCHS, help='variants')
    sizes = [(224, 224), (512, 512), (800, 1344)]
    parser.add_argument('--size', nargs='+', type=size, default=sizes, metavar='HxW', help='of the images')
    parser.add_argument(
        '--stage', nargs='+', type=int, default=[3, 4], choices=[3, 4], help='3: stride 16, 4: stride 32'
    )
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images')
    parser.add_argument(
        '--dtype', default='fp32', choices=list(DTYPES), help='of the maps; narrow ones run under autocast'
    )
    parser.add_argument(
        '--backends',
        nargs='+',
        metavar='NAME',
        help="backends of overlock.ops.contmix, 'published' or 'unfold' (the authors' steps on natten or on an "
        'unfold), or module:function; None is all that can run here',
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    reasons = missing(args.device)
    absent = {name: reason for name, reason in reasons.items() if reason}
    if not args.backends:
        print(*(f'{name}: not measured: {reason}' for name, reason in absent.items()), sep='\n')
    names = args.backends or [name for name in reasons if name not in absent]
    rows = []
    for shape in product(args.arch, args.size, args.stage):
        rows += measure_shape(args, names, *shape)
    print(write_result(f'contmix-{"-".join(args.arch)}-{args.batch}-{args.dtype}', args, rows, absent=absent))
    return 0 if all(map(is_timed, rows)) else 1


def measure_shape(
    args: argparse.Namespace, names: list[str], arch: str, image: tuple[int, int], stage: int
) -> list[dict[str, Any]]:
    """Measure backends on the calls of one stage for one image size, print a table and return its rows."""
    task = {**shape_of(arch, stage, image), 'batch': args.batch, 'dtype': args.dtype, 'device': args.device}
    tasks = {name: {**task, 'backend': name} for name in names}
    on_gpu = args.device.startswith('cuda')
    rows = measure(OperatorCase, tasks, Gate(task, args.threads), MODES, args, kernels=on_gpu)
    for row in rows:
        row |= {'arch': arch, 'image': list(image), 'stage': stage}
    height, width = task['size']
    title = (
        f'{arch} at {image[0]}x{image[1]}, stage {stage}: {args.batch} x {task["channels"]} x {height} x {width}, '
        f'{task["groups"]} groups, kernels {task["kernel_sizes"]}, {args.dtype}; train is forward and backward'
    )
    show(title, rows)
    return rows


if __name__ == '__main__':
    sys.exit(main())
