"""Train a detector or segmenter."""

from __future__ import annotations

import argparse
from typing import Any

from overlock.cli.options import add_config, add_run_options
from overlock.utils.configs import find_config


def add_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_run_options(parser)
    option = parser.add_argument
    resume = 'continue from a checkpoint; without a PATH, from the last complete one in the work folder'
    option('--resume', nargs='?', const='auto', metavar='auto|PATH', help=resume)
    option('--amp', action='store_true', help='train in bfloat16 where the device has it, else in float16')
    option('--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size')
    option('--weights', metavar='FILE', help='start the backbone from these weights: a path, URL or published name')
    ema = 'keep a running average of the weights (momentum 0.0002, more at first), validate it and save it'
    option('--ema', action='store_true', help=ema)
    early = 'end after N validations in a row without a better score'
    option('--early-stop', type=int, metavar='N', help=early)
    for name in ('TensorBoard', 'wandb', 'MLflow'):
        option(f'--{name.lower()}', action='store_true', help=f'log to {name} too')
    on_nan = 'stop, or skip the update, where a loss or a gradient is not finite (default: stop)'
    option('--on-nan', choices=['stop', 'skip'], default='stop', help=on_nan)


def run(config: str, local_rank: str | None = None, **options: Any) -> None:
    path = find_config(config)
    from mmengine_overlock.run import train

    train(path, **options)
