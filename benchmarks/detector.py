#!/usr/bin/env python
"""Measure time and memory of whole detectors and segmenters, in testing or in a training step, and of their parts.

Each row runs in a process of its own; they take turns. Parts are those of one iteration before. Weights are random,
with heads that find as many objects as the configuration keeps. In testing, maps and scores of the tuned models (in
bfloat16 the maps alone) are compared with those of the model as built first: a row that deviates gets no speed.
`OVERLOCK_DATA` names the folder of `coco_tiny`, whose photographs are taken where it is set; else images are noise.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.detectors import DetectorCase
from benchmarks.network import compare
from benchmarks.record import make_parser, show, size, write_result
from benchmarks.rounds import Worker, deviation, is_timed, is_within, measure

ROWS = {
    'test': ('built', 'mmdet', 'tuned', 'tuned+bf16', 'convnext_tiny', 'swin_tiny'),
    'train': ('built', 'mmdet', 'built+bf16', 'convnext_tiny', 'swin_tiny'),
}
# Of maps and scores, relative, against the model as built.
TOLERANCES = {'fp32': 1e-4, 'bf16': 1e-1}


def make_check(mode: str) -> Callable[[dict[str, Any], Worker], dict[str, Any] | None]:
    """Return the check of tuned rows against the one as built, which comes first; it also records the parts."""
    truth: dict[str, Tensor] = {}

    def check(row: dict[str, Any], worker: Worker) -> dict[str, Any] | None:
        found = worker.results()
        row['parts'] = {part: float(spent) for part, spent in worker.results(parts=True).items()}
        if row['name'] == 'built':
            truth.update(found)
        if mode == 'train' or row['name'].partition('+')[0] not in ('built', 'tuned'):
            return None
        dtype = row['task']['dtype']
        # In bfloat16 other proposals are kept, and scores are those of other boxes.
        names = [name for name in truth if dtype == 'fp32' or name != 'output scores']
        compared = ({name: outs[name] for name in names} for outs in (found, truth))
        deviates, limit = {dtype: deviation(*compared)}, {'output': TOLERANCES[dtype]}
        return {'passed': is_within(deviates[dtype], limit), 'deviation': deviates, 'limit': {dtype: limit}}

    return check


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument('--config', default='mask_rcnn_overlock_xt_1x', help='name or path of the configuration')
    parser.add_argument('--mode', default='test', choices=list(ROWS), help='prediction, or a whole training step')
    parser.add_argument('--size', type=size, default=(800, 1344), metavar='HxW', help='of the images')
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images')
    parser.add_argument('--rows', nargs='+', metavar='NAME', help="rows beside 'built' (default: all of the mode)")
    args: argparse.Namespace = parser.parse_args()
    task = {key: getattr(args, key) for key in ('config', 'mode', 'size', 'batch', 'device')}
    tasks = {
        name: {**task, 'row': name.removesuffix('+bf16'), 'dtype': 'bf16' if name.endswith('+bf16') else 'fp32'}
        for name in dict.fromkeys(['built', *(args.rows or ROWS[args.mode])])
    }
    rows = measure(DetectorCase, tasks, make_check(args.mode), {args.mode: {}}, args)
    compare(rows, args.mode, args.batch, base='built')
    what = f'detector-{Path(args.config).stem}-{args.mode}-{args.batch}x3x{args.size[0]}x{args.size[1]}'
    show(what, rows)
    for row in filter(is_timed, rows):
        print(f'{row["name"]}:', *(f'{part} {spent:.3f}' for part, spent in sorted(row['parts'].items())), sep='  ')
    write_result(what, args, rows)
    return 0 if all(map(is_timed, rows)) else 1


if __name__ == '__main__':
    sys.exit(main())
