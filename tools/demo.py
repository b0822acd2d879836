#!/usr/bin/env python
"""Draw a data set of shapes, train Cascade Mask R-CNN with OverLoCK-XT on it from random weights, show the results."""

import argparse
import os
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Threads that wait spin by default, and on cores that other programs use too a step then takes ten times as long.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from mmengine.config import DictAction  # noqa: E402

from demo.detector import draw, run_demo  # noqa: E402
from overlock.utils.distributed import exit_on_user_error  # noqa: E402

TARGET = 0.5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        default='work_dirs/demo',
        help='folder for the data and the results (default: %(default)s)',
    )
    parser.add_argument('--draw-only', action='store_true', help='draw the data set and stop')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings over those of the configuration, as key=value, key="[a,b]" or key=a,b',
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    with exit_on_user_error():
        if args.draw_only:
            print(f'data set: {draw(Path(args.work_dir, "data"))}')
            return 0
        print(
            'Drawing shapes, then training on them: 5 to 10 minutes on 2 CPU cores. A log line follows every 10 '
            'iterations, with the time left (eta).',
            flush=True,
        )
        outcome = run_demo(ROOT / 'configs/demo/cascade_overlock_xt_shapes.py', args.work_dir, args.cfg_options)
    reached = outcome.score >= TARGET
    print(f'\n{outcome}')
    print(f'{"box AP50:":<13} {outcome.score:.3f}, target {TARGET}: {"reached" if reached else "NOT REACHED"}')
    return 0 if reached else 1


if __name__ == '__main__':
    sys.exit(main())
