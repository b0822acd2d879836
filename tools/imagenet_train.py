#!/usr/bin/env python
"""Train a classifier on an image folder; with several GPUs or machines, by torchrun."""

import argparse
import logging
import os
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Threads that wait spin by default, and on cores that other programs use too a step then takes ten times as long.
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from imagenet_overlock.distributed import log_to_terminal
from imagenet_overlock.recipe import add_recipe_options, load_recipe, recipe_options
from imagenet_overlock.train import train
from overlock.utils.distributed import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option('data_dir', metavar='DIR', help='image folder: train/CLASS/*.jpg and val/CLASS/*.jpg')
    option('-c', '--config', metavar='FILE', help='recipe, see configs/imagenet/')
    option('--output', metavar='DIR', help='folder for checkpoints and logs (default: work_dirs/imagenet/<recipe>)')
    resume = 'go on from a checkpoint; without a FILE, from last.pth in the output folder'
    option('--resume', nargs='?', const='auto', metavar='auto|FILE', help=resume)
    option('--device', metavar='NAME', help='cuda or cpu (default: cuda where there is a GPU)')
    option('--tensorboard', action='store_true', help='write scalars for TensorBoard too')
    add_recipe_options(parser)
    args = parser.parse_args()
    options = recipe_options(args)
    with exit_on_user_error():
        recipe = load_recipe(args.config, options)
        log_to_terminal()
        output = args.output or Path('work_dirs/imagenet', Path(args.config).stem if args.config else recipe.model)
        logging.getLogger('imagenet_overlock').info('checkpoints and figures: %s', output)
        train(recipe, args.data_dir, output, args.resume, args.device, args.tensorboard)


if __name__ == '__main__':
    main()
