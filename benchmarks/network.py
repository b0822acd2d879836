#!/usr/bin/env python
"""Time and memory of the whole network: every preset, and ConvNeXt-T and Swin-T beside it if asked for.

Each preset runs in a process of its own; they take turns. First each one's outputs, in training gradients too, are
compared with those of `published` in float64: what deviates gets no speed.
"""

import os
import sys

# This folder itself must not be on the path, where operator.py would hide Python's own module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from torch import Tensor  # noqa: E402

from benchmarks.common import add_run_options, duration, show, size, write_result  # noqa: E402
from benchmarks.presets import BESIDE, FORWARD, TRAIN  # noqa: E402
from benchmarks.rounds import Remote, deviation, may_be_timed, measure  # noqa: E402

# Relative, in float32: of the outputs and gradients; or this many times what the published pipeline deviates by.
TOLERANCE = 1e-5
ALLOWANCE = 4
# Relative, in bfloat16, on the weights of `presets.randomise`.
BF16_TOLERANCES = {'output': 5e-2, 'gradient': 2e-1}
# The most pixels on which a training step is checked: one in float64 takes the double of the memory.
CHECK_PIXELS = 2 * 512 * 512


class Gate:
    """Compares presets with the published pipeline in float64 on the same weights and images.

    What runs in bfloat16 must pass in float32 too. The published pipeline itself is timed whatever it deviates by in
    bfloat16: it is what it is.

    Args:
        task: What is measured, but for the preset.
        threads: Threads of a worker.
    """

    def __init__(self, task: dict[str, Any], threads: int | None) -> None:
        self.task, self.threads = task, threads
        self.change = {'size': check_size(task['size'], task['batch'], task['mode']), 'batch': task['batch']}
        self.truth: dict[str, Tensor] = {}
        self.own: dict[str, float] = {}

    def __call__(self, name: str, worker: Remote, folder: Path) -> dict[str, Any] | None:
        if name in BESIDE:
            return None
        if not self.truth:
            self.truth = self._published('fp64', folder)
            self.own = deviation(self._published('fp32', folder), self.truth)
        limits = {'fp32': {kind: max(TOLERANCE, ALLOWANCE * own) for kind, own in self.own.items()}}
        narrow = name.endswith('+bf16') or worker.task['dtype'] == 'bf16'
        if narrow and name != 'published':
            limits['bf16'] = {kind: BF16_TOLERANCES[kind] for kind in self.own}
        found = {
            dtype: deviation(worker.results(folder, {**self.change, 'dtype': dtype}), self.truth)
            for dtype in ('fp32', *(['bf16'] if narrow else []))
        }
        passed = all(may_be_timed(found[dtype], limits[dtype]) for dtype in limits)
        return {'passed': passed, 'deviation': found, 'limit': limits, 'size': list(self.change['size'])}

    def _published(self, dtype: str, folder: Path) -> dict[str, Tensor]:
        """Outputs and gradients of the published pipeline."""
        task = {**self.task, 'preset': 'published', 'dtype': dtype}
        with Remote('benchmarks.presets', task, self.threads) as worker:
            worker.build()
            return worker.results(folder, self.change)


def check_size(size: tuple[int, int], batch: int, mode: str) -> tuple[int, int]:
    """The size that is measured, or in training one of the same shape with at most `CHECK_PIXELS` in the batch."""
    pixels = batch * size[0] * size[1]
    if mode == 'forward' or pixels <= CHECK_PIXELS:
        return size
    shrink = (CHECK_PIXELS / pixels) ** 0.5
    return tuple(max(32, int(side * shrink) // 32 * 32) for side in size)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='xt', choices=['xt', 't', 's', 'b'], help='variant (default: %(default)s)')
    parser.add_argument(
        '--mode',
        default='forward',
        choices=['forward', 'train'],
        help='forward in evaluation, or forward and backward in training (default: %(default)s)',
    )
    parser.add_argument('--size', type=size, default=(224, 224), metavar='HxW', help='of the images (default: 224x224)')
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images (default: %(default)s)')
    parser.add_argument(
        '--dtype', default='fp32', choices=['fp32', 'bf16'], help='bf16 is autocast (default: %(default)s)'
    )
    parser.add_argument(
        '--network',
        default='auto',
        choices=['auto', 'backbone', 'classifier'],
        help='auto: the classifier at 224x224, else the dense-prediction backbone',
    )
    parser.add_argument(
        '--presets',
        nargs='+',
        metavar='NAME',
        help='what to measure beside `published`: train, deploy, compile or module:function; each may '
        "end in '+bf16' (default: all that the mode has)",
    )
    parser.add_argument('--beside', action='store_true', help='ConvNeXt-T and Swin-T of timm in the same rounds')
    add_run_options(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.network == 'auto':
        args.network = 'classifier' if args.size == (224, 224) else 'backbone'
    names = dict.fromkeys(
        ('published', *(args.presets or (TRAIN if args.mode == 'train' else FORWARD)), *(BESIDE if args.beside else ()))
    )
    common = {key: getattr(args, key) for key in ('arch', 'network', 'mode', 'size', 'batch', 'dtype', 'device')}
    rows = measure(
        'benchmarks.presets',
        {name: {**common, 'preset': name} for name in names},
        Gate(common, args.threads),
        {args.mode: {}},
        args.rounds,
        args.turn_seconds,
        args.threads,
    )
    finish(rows, args.mode, args.batch)
    what = f'network-{args.arch}-{args.mode}-{args.batch}x3x{args.size[0]}x{args.size[1]}-{args.dtype}'
    path = write_result(args.results, what, args.device, vars(args), rows)
    report(rows, what, args.mode, args.device)
    print(path)
    return 0 if all('seconds' in row.get('modes', {}).get(args.mode, {}) for row in rows) else 1


def finish(rows: list[dict[str, Any]], mode: str, batch: int) -> None:
    """Adds images a second, and the ratio to `published` of time and memory."""
    timed = {row['name']: row['modes'][mode] for row in rows if 'seconds' in row.get('modes', {}).get(mode, {})}
    base = timed.get('published')
    for result in timed.values():
        result['images_per_second'] = batch / result['seconds']['median']
        if base:
            result['speedup'] = base['seconds']['median'] / result['seconds']['median']
            result['memory_ratio'] = result['memory']['above_base'] / max(base['memory']['above_base'], 1)


def report(rows: list[dict[str, Any]], what: str, mode: str, device: str) -> None:
    """Prints a line a row."""
    kind = 'allocator' if device.startswith('cuda') else 'process'
    columns = (
        'preset',
        'deviation',
        'median',
        'quartiles',
        'faster',
        'images/s',
        'memory above base',
        'of published',
        f'peak of {kind}',
    )
    show(what, columns, (_line(row, mode) for row in rows))


def _line(row: dict[str, Any], mode: str) -> list[str]:
    check = row.get('check')
    worst = 'not compared' if check is None else f'{max(max(v.values()) for v in check["deviation"].values()):.1e}'
    if 'error' in row:
        return [row['name'], worst if check else '', row['error']]
    if check is not None and not check['passed']:
        return [row['name'], worst, 'wrong: no speed']
    result = row['modes'][mode]
    seconds, memory = result['seconds'], result['memory']
    return [
        row['name'],
        worst,
        duration(seconds['median']),
        f'{duration(seconds["q1"])} - {duration(seconds["q3"])}',
        f'{result["speedup"]:.2f}x' if 'speedup' in result else '',
        f'{result["images_per_second"]:.3g}',
        f'{memory["above_base"] / 2**20:.0f} MiB',
        f'{result["memory_ratio"]:.2f}x' if 'memory_ratio' in result else '',
        f'{memory["peak"] / 2**20:.0f} MiB',
    ]


if __name__ == '__main__':
    sys.exit(main())
