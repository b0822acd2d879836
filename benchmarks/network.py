#!/usr/bin/env python
"""Measure time and memory of the whole network in every preset, beside networks of timm if asked for.

Each preset runs in a process of its own; they take turns. First its outputs, in training its gradients too, are
compared with those of `published` in float64: a preset that deviates gets no speed.
"""

import argparse
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor

from benchmarks.presets import BESIDE, FORWARD, TRAIN, NetworkCase
from benchmarks.record import ARCHS, make_parser, show, size, write_result
from benchmarks.rounds import Worker, compute_truth, deviation, is_timed, is_within, measure

# Relative, in float32, for outputs and gradients; or this many times what the published pipeline deviates by.
TOLERANCE = 1e-5
ALLOWANCE = 4
# Relative, in bfloat16, on the weights of `presets.randomise`.
BF16_TOLERANCES = {'output': 5e-2, 'gradient': 2e-1}
# The most pixels on which a training step is checked: in float64 it takes twice the memory.
CHECK_PIXELS = 2 * 512 * 512


class Gate:
    """Compare presets with the published pipeline in float64 on the same weights and images.

    A row in bfloat16 must pass in float32 too. The published pipeline itself is timed whatever it deviates by in
    bfloat16.

    Args:
        task: What is measured, without the preset.
        threads: Threads of a worker.
    """

    def __init__(self, task: dict[str, Any], threads: int | None) -> None:
        self.task, self.threads = task, threads
        self.change = {'size': check_size(task['size'], task['batch'], task['mode']), 'batch': task['batch']}

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Return the outputs and gradients in float64."""
        return self._published('fp64')

    @cached_property
    def own(self) -> dict[str, float]:
        """Return the deviation of the published pipeline in float32."""
        return deviation(self._published('fp32'), self.truth)

    def __call__(self, name: str, worker: Worker) -> dict[str, Any] | None:
        if name in BESIDE:
            return None
        limits = {'fp32': {kind: max(TOLERANCE, ALLOWANCE * own) for kind, own in self.own.items()}}
        dtypes = ['fp32']
        if name.endswith('+bf16') or worker.task['dtype'] == 'bf16':
            dtypes.append('bf16')
            if name != 'published':
                limits['bf16'] = {kind: BF16_TOLERANCES[kind] for kind in self.own}
        found = {dtype: deviation(worker.results(**self.change, dtype=dtype), self.truth) for dtype in dtypes}
        passed = all(is_within(found[dtype], limits[dtype]) for dtype in limits)
        return {'passed': passed, 'deviation': found, 'limit': limits, 'size': list(self.change['size'])}

    def _published(self, dtype: str) -> dict[str, Tensor]:
        task = {**self.task, **self.change, 'preset': 'published', 'dtype': dtype}
        return compute_truth(NetworkCase, task, self.threads)


def check_size(size: tuple[int, int], batch: int, mode: str) -> tuple[int, int]:
    """Return the measured size, or in training one of the same shape with at most `CHECK_PIXELS` in the batch."""
    pixels = batch * size[0] * size[1]
    if mode == 'forward' or pixels <= CHECK_PIXELS:
        return size
    shrink = (CHECK_PIXELS / pixels) ** 0.5
    height, width = (max(32, int(side * shrink) // 32 * 32) for side in size)
    return height, width


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--arch', default='xt', choices=ARCHS, help='variant')
    parser.add_argument(
        '--mode',
        default='forward',
        choices=['forward', 'train'],
        help='forward in evaluation, or forward and backward in training',
    )
    parser.add_argument('--size', type=size, default=(224, 224), metavar='HxW', help='of the images')
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images')
    parser.add_argument('--dtype', default='fp32', choices=['fp32', 'bf16'], help='bf16 is autocast')
    parser.add_argument(
        '--network',
        default='auto',
        choices=['auto', 'backbone', 'classifier'],
        help='auto is the classifier at 224x224, else the dense-prediction backbone',
    )
    parser.add_argument(
        '--presets',
        nargs='+',
        metavar='NAME',
        help="rows beside 'published': train, deploy, compile or module:function; each may end in '+bf16'; None is "
        'all that the mode has',
    )
    parser.add_argument('--beside', action='store_true', help=f'measure {" and ".join(BESIDE)} of timm too')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.network == 'auto':
        args.network = 'classifier' if args.size == (224, 224) else 'backbone'
    presets = args.presets or (TRAIN if args.mode == 'train' else FORWARD)
    task = {key: getattr(args, key) for key in ('arch', 'network', 'mode', 'size', 'batch', 'dtype', 'device')}
    tasks = {name: {**task, 'preset': name} for name in ('published', *presets, *(BESIDE if args.beside else ()))}
    rows = measure(NetworkCase, tasks, Gate(task, args.threads), {args.mode: {}}, args)
    compare(rows, args.mode, args.batch)
    what = f'network-{args.arch}-{args.mode}-{args.batch}x3x{args.size[0]}x{args.size[1]}-{args.dtype}'
    path = write_result(what, args, rows)
    show(what, rows)
    print(path)
    return 0 if all(map(is_timed, rows)) else 1


def compare(rows: list[dict[str, Any]], mode: str, batch: int) -> None:
    """Add images a second, and the ratios of time and memory to those of `published`, to the rows."""
    timed = {row['name']: row['modes'][mode] for row in rows if is_timed(row)}
    base = timed.get('published')
    for result in timed.values():
        result['images_per_second'] = batch / result['seconds']['median']
        if base:
            result['speedup'] = base['seconds']['median'] / result['seconds']['median']
            result['memory_ratio'] = result['memory']['above_base'] / max(base['memory']['above_base'], 1)


if __name__ == '__main__':
    sys.exit(main())
