"""Train a classifier on an image folder; with several GPUs or machines, by torchrun."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    from imagenet_overlock.recipe import add_recipe_options

    option = parser.add_argument
    option('data_dir', metavar='DIR', help='image folder: train/CLASS/*.jpg and val/CLASS/*.jpg')
    option('-c', '--config', metavar='FILE', help='recipe, see configs/imagenet/')
    option('--output', metavar='DIR', help='folder for checkpoints and logs (default: work_dirs/imagenet/<recipe>)')
    resume = 'go on from a checkpoint; without a FILE, from last.pth in the output folder'
    option('--resume', nargs='?', const='auto', metavar='auto|FILE', help=resume)
    option('--device', metavar='NAME', help='cuda or cpu (default: cuda where there is a GPU)')
    option('--tensorboard', action='store_true', help='write scalars for TensorBoard too')
    add_recipe_options(parser)


def run(
    data_dir: str,
    config: str | None,
    output: str | None,
    resume: str | None,
    device: str | None,
    tensorboard: bool,
    **settings: object,
) -> None:
    from imagenet_overlock.recipe import load_recipe

    recipe = load_recipe(config, settings)
    from imagenet_overlock.distributed import log_to_terminal
    from imagenet_overlock.train import train

    log_to_terminal()
    folder = output or Path('work_dirs/imagenet', Path(config).stem if config else recipe.model)
    logging.getLogger('imagenet_overlock').info('checkpoints and figures: %s', folder)
    train(recipe, data_dir, folder, resume, device, tensorboard)
