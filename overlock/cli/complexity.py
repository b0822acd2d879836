"""Count the parameters and multiply-adds of a detector or segmenter and of its parts."""

from __future__ import annotations

import argparse
from typing import Any

from overlock.cli.options import add_cfg_options, add_config
from overlock.utils.configs import find_config


def add_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    option = parser.add_argument
    size = 'of the image (default: 800 1280 for detectors, 512 2048 for segmenters)'
    option('--size', nargs=2, type=int, metavar=('HEIGHT', 'WIDTH'), help=size)
    option('--training-form', dest='deploy', action='store_false', help='count the backbone before it is folded')
    add_cfg_options(parser)


def run(config: str, **options: Any) -> None:
    path = find_config(config)
    from mmengine_overlock.complexity import count_config

    print(count_config(path, **options))
