#!/usr/bin/env python
"""Measure time and memory of ContMix alone, at the network's real shapes, in every backend that can run here.

Each backend runs in a process of its own; they take turns. First its output and gradients are compared with those of
the `eager` backend in float64 on the same inputs: a backend that deviates gets no speed.
"""

import argparse
import pkgutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import published
from benchmarks.record import make_parser, show, size, write_result
from benchmarks.rounds import Worker, compute_truth, deviation, is_timed, is_within, measure
from overlock import ARCHS, contmix, get_arch
from overlock.models.mixing import NUM_REGIONS
from overlock.ops import explain
from overlock.ops.proof import LIMITS

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# Relative to the largest magnitude of the output, and to the norm of each gradient.
TOLERANCES = {name: LIMITS[dtype] for name, dtype in DTYPES.items()}
MODES = {'forward': {'train': False}, 'train': {'train': True}}
# The authors' steps on natten's kernel or on an unfold; not backends of ours.
PIPELINES = {'published': published.aggregate_natten, 'unfold': published.aggregate_unfold}
# The only build of natten that a recent torch imports is for CPUs; Triton's interpreter there is for tests.
ROWS = {'cpu': ['published', 'unfold', 'eager', 'cpp', 'natten'], 'cuda': ['unfold', 'eager', 'triton']}


@dataclass
class OperatorCase:
    """One call of ContMix as the network makes it; see `benchmarks.rounds`."""

    backend: str  # as `pick` takes it
    channels: int  # of the value
    groups: int
    kernel_sizes: tuple[int, int]
    size: tuple[int, int]  # height and width of the map
    batch: int
    dtype: str  # of query, key and value, a key of `DTYPES`; the parameters are float32, under autocast
    device: torch.device
    exact: bool = False  # compute in float64, on inputs rounded to `dtype`
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        scale = (self.channels / self.groups) ** -0.5
        self.function = partial(pick(self.backend), kernel_sizes=self.kernel_sizes, num_groups=self.groups, scale=scale)
        half, taps = self.channels // 2, sum(kernel**2 for kernel in self.kernel_sizes)
        # As in the network: on CPUs ours runs in channels_last, the published pipeline never does.
        ours = self.device.type == 'cpu' and self.backend not in PIPELINES
        layout = torch.channels_last if ours else torch.contiguous_format
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            x = torch.randn(shape, generator=generator)
            if len(shape) == 4:
                x = x.to(DTYPES[self.dtype], memory_format=layout)
            return x.to(self.device, torch.float64 if self.exact else x.dtype)

        self.inputs = [
            draw(self.batch, half, *self.size),
            draw(self.batch, half, NUM_REGIONS, NUM_REGIONS),
            draw(self.batch, 2 * half, *self.size),
            draw(taps, NUM_REGIONS**2) / NUM_REGIONS,
            draw(taps),
            *(draw(self.groups, 2 * kernel - 1, 2 * kernel - 1) for kernel in self.kernel_sizes),
        ]
        for tensor in self.inputs:
            tensor.requires_grad_()
        self.grad = draw(self.batch, 2 * half, *self.size)

    def run(self, train: bool = True) -> dict[str, Tensor]:
        """Run one iteration, forward and backward or forward alone."""
        narrow = self.dtype != 'fp32' and not self.exact
        with torch.inference_mode(not train):
            with torch.autocast(self.device.type, DTYPES[self.dtype]) if narrow else nullcontext():
                out = self.function(*self.inputs)
        if not train:
            return {'output': out}
        gradients = torch.autograd.grad(out, self.inputs, self.grad.to(out.dtype))
        return {'output': out.detach()} | {f'gradient {i}': gradient for i, gradient in enumerate(gradients)}


def pick(backend: str) -> Callable[..., Tensor]:
    """Return the function of a backend, of a pipeline, or 'module:function', called as `overlock.contmix` is."""
    if backend in PIPELINES:
        return partial(published.contmix, aggregate=PIPELINES[backend])
    return pkgutil.resolve_name(backend) if ':' in backend else partial(contmix, backend=backend)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--arch', nargs='+', default=['xt', 's'], choices=ARCHS, help='variants')
    sizes = [(224, 224), (512, 512), (800, 1344)]
    parser.add_argument('--size', nargs='+', type=size, default=sizes, metavar='HxW', help='of the images')
    parser.add_argument('--stage', nargs='+', type=int, default=[3, 4], choices=[3, 4], help='at stride 16 and 32')
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images')
    parser.add_argument('--dtype', default='fp32', choices=DTYPES, help='of the maps; narrow ones run under autocast')
    backends = (
        "of overlock.ops.contmix; 'published' or 'unfold', the authors' steps on natten or an unfold; or "
        'module:function; None is all that can run here'
    )
    parser.add_argument('--backends', nargs='+', metavar='NAME', help=backends)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    reasons = explain()
    reasons |= {'published': reasons['natten'], 'unfold': 'available'}
    names = ROWS[torch.device(args.device).type]
    absent = {name: reasons[name] for name in names if reasons[name] != 'available'}
    if not args.backends:
        print(*(f'{name}: not measured: {reason}' for name, reason in absent.items()), sep='\n')
        args.backends = [name for name in names if name not in absent]
    rows = []
    for shape in product(args.arch, args.size, args.stage):
        rows += measure_shape(args, *shape)
    write_result(f'contmix-{"-".join(args.arch)}-{args.batch}-{args.dtype}', args, rows, absent=absent)
    return 0 if all(map(is_timed, rows)) else 1


def measure_shape(args: argparse.Namespace, arch: str, image: tuple[int, int], stage: int) -> list[dict[str, Any]]:
    """Measure backends on the calls of one stage for one image size, print a table and return its rows."""
    shape = get_arch(arch)
    kernel, stride = shape.dynamic_kernel_sizes[stage - 3], 2 ** (stage + 1)
    # The network enlarges maps that are smaller than the kernel.
    height, width = (max(kernel, -(-side // stride)) for side in image)
    task: dict[str, Any] = {
        'channels': shape.embed_dims[stage - 1],
        'groups': shape.focus_groups[stage - 3],
        'kernel_sizes': (shape.small_kernel_size, kernel),
        'size': (height, width),
        'batch': args.batch,
        'dtype': args.dtype,
        'device': args.device,
    }
    truth = compute_truth(OperatorCase, {**task, 'backend': 'eager', 'exact': True}, args.threads)
    limits = dict.fromkeys(('output', 'gradient'), TOLERANCES[args.dtype])

    def check(row: dict[str, Any], worker: Worker) -> dict[str, Any]:
        found = deviation(worker.results(), truth)
        return {'passed': is_within(found, limits), 'deviation': found, 'limit': limits}

    tasks = {name: {**task, 'backend': name} for name in args.backends}
    rows = measure(OperatorCase, tasks, check, MODES, args)
    for row in rows:
        row |= {'arch': arch, 'image': list(image), 'stage': stage}
    title = (
        f'{arch} at {image[0]}x{image[1]}, stage {stage}: {args.batch} x {task["channels"]} x {height} x {width}, '
        f'{task["groups"]} groups, kernels {task["kernel_sizes"]}, {args.dtype}; train is forward and backward'
    )
    show(title, rows)
    return rows


if __name__ == '__main__':
    sys.exit(main())
