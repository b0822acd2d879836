#!/usr/bin/env python
"""Draw ten classes of textures and shapes, train OverLoCK-XT on them from random weights, validate both heads."""

import argparse
import os
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# Threads that wait spin by default, and on cores that other programs use too a step then takes ten times as long.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from demo.classifier import draw, run_demo  # noqa: E402
from imagenet_overlock.distributed import log_to_terminal  # noqa: E402
from imagenet_overlock.recipe import add_recipe_options, recipe_options  # noqa: E402
from overlock.utils.distributed import exit_on_user_error  # noqa: E402

TARGET = 80


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        default='work_dirs/imagenet_demo',
        help='folder for the images and the results (default: %(default)s)',
    )
    parser.add_argument('--draw-only', action='store_true', help='draw the images and stop')
    add_recipe_options(parser, 'model', 'img_size', 'batch_size', 'workers', 'epochs', 'lr', 'amp', 'seed')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    options = recipe_options(args)
    with exit_on_user_error():
        if args.draw_only:
            print(f'image folder: {draw(Path(args.work_dir, "data"))}')
            return 0
        log_to_terminal()
        outcome = run_demo(ROOT / 'configs/imagenet/demo.yaml', args.work_dir, options)
    reached = outcome.score >= TARGET
    print(f'\n{outcome}')
    print(f'{"top-1:":<18} {outcome.score:.1f}, target {TARGET}: {"reached" if reached else "NOT REACHED"}')
    return 0 if reached else 1


if __name__ == '__main__':
    sys.exit(main())
