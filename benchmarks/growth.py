#!/usr/bin/env python
"""How time and memory of a forward pass in the deploy form grow with the image and with the batch.

Each shape runs in a process of its own; they take turns. At 224x224 the outputs are first compared with those of the
published pipeline in float64. `--plot` draws the figure of a JSON that is there already.
"""

import os
import sys

# This folder itself must not be on the path, where operator.py would hide Python's own module.
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [os.path.dirname(HERE), *(path for path in sys.path if os.path.realpath(path) != HERE)]

import argparse  # noqa: E402
import json  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.common import ROOT, add_run_options, duration, show, size, write_result, write_whole  # noqa: E402
from benchmarks.network import Gate  # noqa: E402
from benchmarks.rounds import measure  # noqa: E402

SIZES = [(224, 224), (320, 320), (512, 512), (640, 1024), (800, 1344), (1024, 1536), (1280, 2048)]
BATCHES = [1, 2, 4, 8]
FIGURE = ROOT / 'docs' / 'cost.png'
# Okabe and Ito's colours, told apart by everyone.
COLOURS = {'xt': '#0072B2', 't': '#009E73', 's': '#D55E00', 'b': '#CC79A7'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--arch', nargs='+', default=['xt', 's'], choices=list(COLOURS), help='variants (default: xt s)'
    )
    parser.add_argument(
        '--sizes',
        nargs='+',
        type=size,
        default=SIZES,
        metavar='HxW',
        help='of single images (default: 224x224 to 1280x2048)',
    )
    parser.add_argument(
        '--batches',
        nargs='+',
        type=int,
        default=BATCHES,
        metavar='N',
        help='at the first of the sizes (default: 1 2 4 8)',
    )
    parser.add_argument(
        '--dtype', default='fp32', choices=['fp32', 'bf16'], help='bf16 is autocast (default: %(default)s)'
    )
    parser.add_argument(
        '--preset',
        default='deploy',
        metavar='NAME',
        help='as in network.py, such as benchmarks.presets:keep_memory (default: %(default)s)',
    )
    parser.add_argument('--plot', type=Path, metavar='JSON', help='measure nothing, draw this result')
    parser.add_argument(
        '--figure', type=Path, default=FIGURE, metavar='PNG', help='where to draw (default: %(default)s)'
    )
    add_run_options(parser)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    source = args.plot
    if not source:
        rows = [row for arch in args.arch for row in measure_arch(args, arch)]
        source = write_result(args.results, f'growth-{"-".join(args.arch)}-{args.dtype}', args.device, vars(args), rows)
        columns = ('variant and images', 'median', 'quartiles', 'memory above base')
        show(f'forward, {args.preset}', columns, map(_line, rows))
        print(source)
        if not all('seconds' in row.get('modes', {}).get('forward', {}) for row in rows):
            return 1
    plot(json.loads(source.read_text()), args.figure)
    print(args.figure)
    return 0


def measure_arch(args: argparse.Namespace, arch: str) -> list[dict[str, Any]]:
    """A row for each size at batch 1 and for each batch at the first size."""
    common = {'arch': arch, 'network': 'backbone', 'mode': 'forward', 'dtype': args.dtype, 'device': args.device}
    shapes = dict.fromkeys([*((image, 1) for image in args.sizes), *((args.sizes[0], batch) for batch in args.batches)])
    tasks = {
        f'{arch} {batch}x3x{image[0]}x{image[1]}': {**common, 'preset': args.preset, 'size': image, 'batch': batch}
        for image, batch in shapes
    }
    # One comparison serves all shapes: the form is the same.
    gate = Gate({**common, 'size': args.sizes[0], 'batch': 1}, args.threads)
    verdicts: list = []

    def once(name: str, *rest: Any) -> dict | None:
        if not verdicts:
            verdicts.append(gate(name, *rest))
        return verdicts[0]

    return measure('benchmarks.presets', tasks, once, {'forward': {}}, args.rounds, args.turn_seconds, args.threads)


def _line(row: dict[str, Any]) -> list[str]:
    result = row.get('modes', {}).get('forward', {})
    if 'seconds' not in result:
        return [row['name'], row.get('error', 'wrong: no speed')]
    seconds = result['seconds']
    return [
        row['name'],
        duration(seconds['median']),
        f'{duration(seconds["q1"])} - {duration(seconds["q3"])}',
        f'{result["memory"]["above_base"] / 2**20:.0f} MiB',
    ]


def plot(record: dict[str, Any], path: str | Path) -> None:
    """Draws a result of this benchmark: time and memory over pixels and over the batch.

    Args:
        record: What is in the JSON.
        path: The picture, written whole.
    """
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot

    rows = [row for row in record['rows'] if 'seconds' in row.get('modes', {}).get('forward', {})]
    style = {
        'font.size': 9,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.grid': True,
        'grid.alpha': 0.3,
        'axes.titlesize': 10,
        'axes.axisbelow': True,
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(2, 2, figsize=(8.5, 6.4), layout='constrained')
        for arch in dict.fromkeys(row['task']['arch'] for row in rows):
            own = [row for row in rows if row['task']['arch'] == arch]
            _draw(axes[:, 0], [row for row in own if row['task']['batch'] == 1], _megapixels, COLOURS[arch], arch)
            smallest = min(own, key=_megapixels)['task']['size']
            _draw(
                axes[:, 1],
                [row for row in own if row['task']['size'] == smallest],
                lambda row: row['task']['batch'],
                COLOURS[arch],
                arch,
            )
        axes[0, 0].plot([], [], color='0.5', ls='--', lw=1, label='in proportion')
        axes[0, 0].legend(frameon=False)
        _label(axes, record, smallest)
        figure.text(0.5, -0.01, _caption(record), ha='center', va='top', fontsize=8, color='0.35')
        write_whole(path, lambda temporary: figure.savefig(temporary, dpi=160, bbox_inches='tight'))
        pyplot.close(figure)


def _draw(axes: Any, rows: list[dict[str, Any]], position: Callable[[dict], float], colour: str, arch: str) -> None:
    """A variant's time, with the quartiles as a band, above its memory; dashed, what grows in proportion."""
    rows = sorted(rows, key=position)
    x = [position(row) for row in rows]
    seconds = [row['modes']['forward']['seconds'] for row in rows]
    memory = [row['modes']['forward']['memory']['above_base'] / 2**20 for row in rows]
    axes[0].fill_between(x, [s['q1'] for s in seconds], [s['q3'] for s in seconds], color=colour, alpha=0.2, lw=0)
    for axis, values in zip(axes, ([s['median'] for s in seconds], memory), strict=True):
        axis.plot(x, values, color=colour, marker='o', markersize=4, label=f'OverLoCK-{arch.upper()}')
        axis.plot(x, [values[-1] * place / x[-1] for place in x], color=colour, ls='--', lw=1, alpha=0.6)


def _label(axes: Any, record: dict[str, Any], smallest: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

    above = 'weights' if 'gpu' in record['machine'] else 'idle process'
    for axis, what, unit in ((axes[0], 'Time', 'seconds'), (axes[1], 'Peak memory', f'MiB above the {above}')):
        axis[0].set(title=f'{what} of one image', ylabel=unit)
        axis[1].set(title=f'{what} of a batch, {smallest[0]}x{smallest[1]} each', ylabel=unit)
    batches = sorted({row['task']['batch'] for row in record['rows']})
    for axis in axes.flat:
        axis.set(xscale='log', yscale='log')
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(LogLocator(subs=(1, 2, 5)))
            side.set_major_formatter('{x:g}')
            side.set_minor_formatter(NullFormatter())
    for axis in axes[:, 0]:
        axis.set_xlabel('megapixels')
    for axis in axes[:, 1]:
        axis.set_xlabel('images')
        axis.xaxis.set_major_locator(FixedLocator(batches))
        axis.xaxis.set_minor_locator(FixedLocator([]))


def _caption(record: dict[str, Any]) -> str:
    machine = record['machine']
    where = machine.get('gpu') or f'{machine["cpu"]}, {machine["threads"]} threads'
    commit = (record['commit']['hash'] or 'unknown')[:7]
    preset = record['settings'].get('preset', 'deploy').rpartition(':')[2]
    return (
        f'Dense-prediction backbone, forward pass, preset {preset}, {record["settings"]["dtype"]}; {where};\n'
        f'torch {record["versions"]["torch"]}; {record["date"][:10]}, commit {commit}'
    )


def _megapixels(row: dict[str, Any]) -> float:
    return row['task']['size'][0] * row['task']['size'][1] / 1e6


if __name__ == '__main__':
    sys.exit(main())
