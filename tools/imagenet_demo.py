#!/usr/bin/env python
"""Draw ten classes of textures and shapes, train OverLoCK-XT on them from random weights, validate both heads."""

import argparse
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from demo.classifier import draw, run_demo
from demo.outcome import add_options
from imagenet_overlock.distributed import log_to_terminal
from imagenet_overlock.recipe import add_recipe_options, recipe_options
from overlock.utils.distributed import exit_on_user_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, 'work_dirs/imagenet_demo')
    add_recipe_options(parser, 'model', 'img_size', 'batch_size', 'workers', 'epochs', 'lr', 'amp', 'seed')
    args = parser.parse_args()
    options = recipe_options(args)
    with exit_on_user_error():
        if args.draw_only:
            print(f'image folder: {draw(Path(args.work_dir, "data"))}')
            return 0
        log_to_terminal()
        outcome = run_demo(ROOT / 'configs/imagenet/demo.yaml', args.work_dir, options)
    print(f'\n{outcome}')
    return 0 if outcome.reached else 1


if __name__ == '__main__':
    sys.exit(main())
