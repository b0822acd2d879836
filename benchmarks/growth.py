#!/usr/bin/env python
"""Measure how time and memory of a forward pass grow with the image and with the batch, and draw it.

Each shape runs in a process of its own; they take turns. First its network is compared with the published pipeline in
float64 on one image of the first size.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.network import make_check
from benchmarks.presets import NetworkCase
from benchmarks.record import ROOT, make_parser, show, size, write_result
from benchmarks.rounds import is_timed, measure
from overlock import ARCHS
from overlock.utils.files import whole_file

SIZES = [(224, 224), (320, 320), (512, 512), (640, 1024), (800, 1344), (1024, 1536), (1280, 2048)]
# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS = dict(zip(ARCHS, ('#0072B2', '#009E73', '#D55E00', '#CC79A7'), strict=True))
STYLE: dict[Any, Any] = {
    'font.size': 9,
    'axes.titlesize': 10,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.alpha': 0.3,
}


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument('--arch', nargs='+', default=['xt', 's'], choices=ARCHS, help='variants')
    parser.add_argument('--sizes', nargs='+', type=size, default=SIZES, metavar='HxW', help='of single images')
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 2, 4, 8], metavar='N', help='at the first size')
    parser.add_argument('--dtype', default='fp32', choices=['fp32', 'bf16'], help='bf16 is autocast')
    parser.add_argument('--preset', default='deploy', metavar='NAME', help='as in network.py')
    parser.add_argument('--plot', type=Path, metavar='JSON', help='measure nothing and draw this result')
    figure = ROOT / 'docs' / 'cost.png'
    parser.add_argument('--figure', type=Path, default=figure, metavar='PNG', help='where to draw')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    source = args.plot
    if not source:
        rows = [row for arch in args.arch for row in measure_arch(args, arch)]
        show(f'forward, {args.preset}', rows)
        source = write_result(f'growth-{"-".join(args.arch)}-{args.dtype}', args, rows)
        if not all(map(is_timed, rows)):
            return 1
    plot(json.loads(source.read_text()), args.figure)
    print(args.figure)
    return 0


def measure_arch(args: argparse.Namespace, arch: str) -> list[dict[str, Any]]:
    """Measure each size at batch 1 and each batch at the first size, and return their rows."""
    task = {'arch': arch, 'network': 'backbone', 'mode': 'forward', 'dtype': args.dtype, 'device': args.device}
    shapes = dict.fromkeys([*((image, 1) for image in args.sizes), *((args.sizes[0], batch) for batch in args.batches)])
    tasks = {
        f'{arch} {batch}x3x{image[0]}x{image[1]}': {**task, 'preset': args.preset, 'size': image, 'batch': batch}
        for image, batch in shapes
    }
    check = make_check({**task, 'size': args.sizes[0], 'batch': 1}, args.threads)
    return measure(NetworkCase, tasks, check, {'forward': {}}, args)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the time and memory of a JSON of this benchmark over pixels and over the batch."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in record['rows'] if is_timed(row)]
    smallest = min(rows, key=megapixels)['task']['size']
    with rc_context(STYLE):
        figure = Figure(figsize=(8.5, 6.4), layout='constrained')
        axes = figure.subplots(2, 2)
        for arch in dict.fromkeys(row['task']['arch'] for row in rows):
            own = [row for row in rows if row['task']['arch'] == arch]
            draw(axes[:, 0], [row for row in own if row['task']['batch'] == 1], megapixels)
            draw(axes[:, 1], [row for row in own if row['task']['size'] == smallest], lambda row: row['task']['batch'])
        axes[0, 0].plot([], [], color='0.5', ls='--', lw=1, label='in proportion')
        axes[0, 0].legend(frameon=False)
        above = 'weights' if 'gpu' in record['machine'] else 'idle process'
        for axis, what, unit in zip(axes, ('Time', 'Peak memory'), ('seconds', f'MiB above the {above}'), strict=True):
            axis[0].set(title=f'{what} of one image', xlabel='megapixels', ylabel=unit)
            axis[1].set(title=f'{what} of a batch, {smallest[0]}x{smallest[1]} each', xlabel='images', ylabel=unit)
            label_ticks(axis[0])
            label_ticks(axis[1], sorted({row['task']['batch'] for row in rows}))
        figure.text(0.5, -0.01, describe(record), ha='center', va='top', fontsize=8, color='0.35')
        with whole_file(path) as file:
            figure.savefig(file, dpi=160, bbox_inches='tight', format=path.suffix.lstrip('.'))


def draw(axes: Any, rows: list[dict[str, Any]], position: Callable[[dict[str, Any]], float]) -> None:
    """Draw a variant's time, with the quartiles as a band, above its memory; dashed lines grow in proportion."""
    rows = sorted(rows, key=position)
    arch = rows[0]['task']['arch']
    x = [position(row) for row in rows]
    seconds = [row['modes']['forward']['seconds'] for row in rows]
    memory = [row['modes']['forward']['memory']['above_base'] / 2**20 for row in rows]
    color = COLORS[arch]
    axes[0].fill_between(x, [s['q1'] for s in seconds], [s['q3'] for s in seconds], color=color, alpha=0.2, lw=0)
    for axis, values in zip(axes, ([s['median'] for s in seconds], memory), strict=True):
        axis.plot(x, values, color=color, marker='o', markersize=4, label=f'OverLoCK-{arch.upper()}')
        axis.plot(x, [values[-1] * place / x[-1] for place in x], color=color, ls='--', lw=1, alpha=0.6)


def label_ticks(axis: Any, positions: list[int] | None = None) -> None:
    """Scale both sides by logarithms, with plain numbers at 1, 2 and 5, or at the positions given along x."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set(xscale='log', yscale='log')
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(subs=(1, 2, 5)))
        side.set_major_formatter('{x:g}')
        side.set_minor_formatter(NullFormatter())
    if positions:
        axis.set_xticks(positions)
        axis.set_xticks([], minor=True)


def describe(record: dict[str, Any]) -> str:
    """Return what the figure depends on."""
    machine, settings = record['machine'], record['settings']
    where = machine.get('gpu') or f'{machine["cpu"]}, {machine["threads"]} threads'
    preset = settings.get('preset', 'deploy').rpartition(':')[2]
    commit = (record['commit']['hash'] or 'unknown')[:7]
    return (
        f'Dense-prediction backbone, forward pass, preset {preset}, {settings["dtype"]}; {where};\n'
        f'torch {record["versions"]["torch"]}; {record["date"][:10]}, commit {commit}'
    )


def megapixels(row: dict[str, Any]) -> float:
    """Return the pixels of an image of a row, in millions."""
    return row['task']['size'][0] * row['task']['size'][1] / 1e6


if __name__ == '__main__':
    sys.exit(main())
