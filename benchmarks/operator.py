#!/usr/bin/env python
"""Time and memory of ContMix alone, at the network's real shapes: every backend that can run here.

Each backend runs in a process of its own; they take turns. First each one's output and gradients are compared with
those of the `reference` backend in float64 on the same inputs: what deviates gets no speed.
"""

import os
import sys

# This folder itself must not be on the path, where this very file would hide Python's own module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.calls import DTYPES, shape_of  # noqa: E402
from benchmarks.common import add_run_options, duration, show, size, write_result  # noqa: E402
from benchmarks.rounds import Remote, deviation, may_be_timed, measure  # noqa: E402
from overlock.ops import explain  # noqa: E402

# Relative to the largest magnitude of the output and of each gradient.
TOLERANCES = {'fp32': 1e-5, 'bf16': 5e-2, 'fp16': 1e-2}
# For the reference, which makes every window in float64, and a few tensors of that size in its backward pass.
REFERENCE_BYTES = 4 * 2**30
# natten's one build that a recent torch imports is for CPUs; Triton's interpreter there is for tests.
ONLY_ON = {'compiled': 'cpu', 'natten': 'cpu', 'published': 'cpu', 'triton': 'cuda'}
MODES = {'forward': {'train': False}, 'train': {'train': True}}


class Gate:
    """Compares backends with the reference in float64 on the same inputs, on a smaller map if that is too large."""

    def __init__(self, task: dict[str, Any], threads: int | None) -> None:
        self.task, self.threads = task, threads
        self.change = {'size': check_map(task)}
        self.truth: dict = {}

    def __call__(self, name: str, worker: Remote, folder: Path) -> dict[str, Any]:
        if not self.truth:
            task = {**self.task, 'size': self.change['size'], 'backend': 'reference', 'exact': True}
            with Remote('benchmarks.calls', task, self.threads) as reference:
                reference.build()
                self.truth = reference.results(folder, {})
        found = deviation(worker.results(folder, self.change), self.truth)
        limits = dict.fromkeys(('output', 'gradient'), TOLERANCES[self.task['dtype']])
        return {
            'passed': may_be_timed(found, limits),
            'deviation': found,
            'limit': limits,
            'map': list(self.change['size']),
        }


def check_map(task: dict[str, Any]) -> tuple[int, int]:
    """The map that is measured, or the largest of half, a quarter, ... its sides that the reference has room for."""
    height, width = task['size']
    kernel = task['kernel_sizes'][1]
    # Eight bytes, half the channels; about four such tensors at once.
    per_pixel = 4 * 8 * task['batch'] * task['channels'] // 2 * kernel**2
    while height * width * per_pixel > REFERENCE_BYTES and min(height, width) >= 2 * kernel:
        height, width = height // 2, width // 2
    return height, width


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--arch', nargs='+', default=['xt', 's'], choices=['xt', 't', 's', 'b'], help='variants (default: xt s)'
    )
    parser.add_argument(
        '--size',
        nargs='+',
        type=size,
        default=[(224, 224), (512, 512), (800, 1344)],
        metavar='HxW',
        help='of the images (default: 224x224 512x512 800x1344)',
    )
    parser.add_argument(
        '--stage',
        nargs='+',
        type=int,
        default=[3, 4],
        choices=[3, 4],
        help='3: stride 16, 4: stride 32 (default: both)',
    )
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images (default: %(default)s)')
    parser.add_argument(
        '--dtype',
        default='fp32',
        choices=list(DTYPES),
        help='of the maps; narrow ones run under autocast (default: %(default)s)',
    )
    parser.add_argument(
        '--backends',
        nargs='+',
        metavar='NAME',
        help="backends of overlock.ops.contmix, 'published' or 'unfold' (the published pipeline on "
        'natten or on an unfold), or module:function (default: all that can run here)',
    )
    add_run_options(parser)
    return parser.parse_args()


def backends(device: str) -> tuple[list[str], dict[str, str]]:
    """What can be measured on a device, and of the rest why not."""
    reasons = explain()
    # The pipeline `published` is natten's.
    reasons = {'published': reasons['natten'], 'unfold': 'available', **reasons}
    reasons['reference'] = 'slow by design; the others are compared with it'
    for name, only in ONLY_ON.items():
        if reasons.get(name) == 'available' and not device.startswith(only):
            reasons[name] = f'for {only} alone'
    return (
        [name for name, reason in reasons.items() if reason == 'available'],
        {name: reason for name, reason in reasons.items() if reason != 'available'},
    )


def main() -> int:
    args = parse_args()
    names, absent = backends(args.device)
    names = args.backends or names
    if not args.backends:
        for name, reason in absent.items():
            print(f'{name}: not measured: {reason}')
    rows = []
    for arch in args.arch:
        for image in args.size:
            for stage in args.stage:
                rows += measure_shape(args, names, arch, image, stage)
    what = f'operator-{"-".join(args.arch)}-{args.batch}-{args.dtype}'
    path = write_result(args.results, what, args.device, {**vars(args), 'absent': absent}, rows)
    print(path)
    return 0 if all('seconds' in row.get('modes', {}).get('train', {}) for row in rows) else 1


def measure_shape(
    args: argparse.Namespace, names: list[str], arch: str, image: tuple[int, int], stage: int
) -> list[dict[str, Any]]:
    """Measures all backends on the calls of one stage for one image size, prints a table and returns its rows."""
    task = {**shape_of(arch, stage, image), 'batch': args.batch, 'dtype': args.dtype, 'device': args.device}
    height, width = task['size']
    title = (
        f'{arch} at {image[0]}x{image[1]}, stage {stage}: {args.batch} x {task["channels"]} x {height} x {width}, '
        f'{task["groups"]} groups, kernels {task["kernel_sizes"]}, {args.dtype}'
    )
    rows = measure(
        'benchmarks.calls',
        {name: {**task, 'backend': name} for name in names},
        Gate(task, args.threads),
        MODES,
        args.rounds,
        args.turn_seconds,
        args.threads,
        kernels=args.device.startswith('cuda'),
        say=lambda line: None,
    )
    for row in rows:
        row |= {'arch': arch, 'image': list(image), 'stage': stage}
    columns = [
        'backend',
        'deviation',
        'forward',
        'quartiles',
        'forward + backward',
        'quartiles',
        'memory',
        'in training',
    ]
    if args.device.startswith('cuda'):
        columns += ['kernels, forward', 'kernels, backward']
    show(title, columns, map(_line, rows))
    return rows


def _line(row: dict[str, Any]) -> list[str]:
    check = row.get('check')
    worst = f'{max(check["deviation"].values()):.1e}' if check else ''
    if 'error' in row:
        return [row['name'], worst, row['error']]
    if not check['passed']:
        return [row['name'], worst, 'wrong: no speed']
    seconds = [row['modes'][mode]['seconds'] for mode in MODES]
    cells = [
        text
        for found in seconds
        for text in (duration(found['median']), f'{duration(found["q1"])} - {duration(found["q3"])}')
    ]
    memory = [f'{row["modes"][mode]["memory"]["iteration"] / 2**20:.1f} MiB' for mode in MODES]
    return [row['name'], worst, *cells, *memory, *map(duration, row.get('kernel_seconds', {}).values())]


if __name__ == '__main__':
    sys.exit(main())
