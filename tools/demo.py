#!/usr/bin/env python
"""Draw a data set of shapes, train Cascade Mask R-CNN with OverLoCK-XT on it from random weights, show the results."""

import argparse
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.detector import draw, run_demo
from demo.outcome import add_options
from overlock.cli.options import add_cfg_options
from overlock.utils.distributed import exit_on_user_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, 'work_dirs/demo')
    add_cfg_options(parser)
    args = parser.parse_args()
    with exit_on_user_error():
        if args.draw_only:
            print(f'data set: {draw(Path(args.work_dir, "data"))}')
            return 0
        print('Drawing shapes, then training on them: 5 to 10 minutes on 2 CPU cores.', flush=True)
        outcome = run_demo(ROOT / 'configs/demo/cascade_overlock_xt_shapes.py', args.work_dir, args.cfg_options)
    print(f'\n{outcome}')
    return 0 if outcome.reached else 1


if __name__ == '__main__':
    sys.exit(main())
