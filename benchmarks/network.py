#!/usr/bin/env python
"""Measure time and memory of the whole network in every preset, beside networks of timm if asked for.

Each preset runs in a process of its own; they take turns. First its outputs, in training its gradients too, are
compared with those of `published` in float64: a preset that deviates gets no speed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.presets import BESIDE, FORWARD, TRAIN, NetworkCase, is_beside
from benchmarks.record import make_parser, show, size, write_result
from benchmarks.rounds import Worker, compute_truth, deviation, is_timed, is_within, measure
from overlock import ARCHS

# Relative, in float32, for outputs and gradients; or this many times what the published pipeline deviates by.
TOLERANCE = 1e-5
ALLOWANCE = 4
# Relative, in bfloat16, on the weights of `presets.randomise`.
BF16_TOLERANCES = {'output': 5e-2, 'gradient': 2e-1}


def make_check(task: dict[str, Any], threads: int | None) -> Callable[[dict[str, Any], Worker], dict[str, Any] | None]:
    """Return the check of presets against the published pipeline in float64 on the same weights and images.

    A row in bfloat16 must pass in float32 too. The published pipeline itself is timed whatever it deviates by in
    bfloat16.

    Args:
        task: What is measured, without the preset.
        threads: Threads of a worker.
    """
    change = {'size': task['size'], 'batch': task['batch']}
    if task['mode'] == 'train':  # in float64 it takes twice the memory
        change = {'size': tuple(min(side, 512) for side in task['size']), 'batch': min(task['batch'], 2)}
    exact, single = (
        compute_truth(NetworkCase, {**task, **change, 'preset': 'published', 'dtype': dtype}, threads)
        for dtype in ('fp64', 'fp32')
    )
    single_limits = {kind: max(TOLERANCE, ALLOWANCE * own) for kind, own in deviation(single, exact).items()}

    def check(row: dict[str, Any], worker: Worker) -> dict[str, Any] | None:
        if is_beside(row['name']):
            return None
        dtypes = list(dict.fromkeys(('fp32', row['task']['dtype'])))
        found = {dtype: deviation(worker.results(**change, dtype=dtype), exact) for dtype in dtypes}
        limits = {'fp32': single_limits}
        if 'bf16' in dtypes and row['name'] != 'published':
            limits['bf16'] = {kind: BF16_TOLERANCES[kind] for kind in single_limits}
        passed = all(is_within(found[dtype], limits[dtype]) for dtype in limits)
        return {'passed': passed, 'deviation': found, 'limit': limits, 'size': list(change['size'])}

    return check


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--arch', default='xt', choices=ARCHS, help='variant')
    modes = 'forward in evaluation, or forward and backward in training'
    parser.add_argument('--mode', default='forward', choices=['forward', 'train'], help=modes)
    parser.add_argument('--size', type=size, default=(224, 224), metavar='HxW', help='of the images')
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images')
    parser.add_argument('--dtype', default='fp32', choices=['fp32', 'bf16'], help='bf16 is autocast')
    networks = 'auto is the classifier at 224x224, else the dense-prediction backbone'
    parser.add_argument('--network', default='auto', choices=['auto', 'backbone', 'classifier'], help=networks)
    presets = (
        "rows beside 'published': train, deploy, compile or module:function; each may end in '+bf16'; None is all that "
        'the mode has'
    )
    parser.add_argument('--presets', nargs='+', metavar='NAME', help=presets)
    others = f"measure these too, without a name all of them: {', '.join(BESIDE)}; each may end in '+compile'"
    parser.add_argument('--beside', nargs='*', metavar='NAME', help=others)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.network == 'auto':
        args.network = 'classifier' if args.size == (224, 224) else 'backbone'
    task = {key: getattr(args, key) for key in ('arch', 'network', 'mode', 'size', 'batch', 'dtype', 'device')}
    names = ['published', *(args.presets or (TRAIN if args.mode == 'train' else FORWARD))]
    tasks = {}
    for name in names + (list(BESIDE) if args.beside == [] else args.beside or []):
        preset = name.removesuffix('+bf16')
        tasks[name] = {**task, 'preset': preset, 'dtype': task['dtype'] if preset == name else 'bf16'}
    rows = measure(NetworkCase, tasks, make_check(task, args.threads), {args.mode: {}}, args)
    compare(rows, args.mode, args.batch)
    what = f'network-{args.arch}-{args.mode}-{args.batch}x3x{args.size[0]}x{args.size[1]}-{args.dtype}'
    show(what, rows)
    write_result(what, args, rows)
    return 0 if all(map(is_timed, rows)) else 1


def compare(rows: list[dict[str, Any]], mode: str, batch: int, base: str = 'published') -> None:
    """Add images a second, and the ratios of time and memory to those of the row `base`, to the rows."""
    timed = {row['name']: row['modes'][mode] for row in rows if is_timed(row)}
    other = timed.get(base)
    for result in timed.values():
        result['images_per_second'] = batch / result['seconds']['median']
        if other:
            result['speedup'] = other['seconds']['median'] / result['seconds']['median']
            result['memory_ratio'] = result['memory']['above_base'] / max(other['memory']['above_base'], 1)


if __name__ == '__main__':
    sys.exit(main())
