"""Evaluate a trained detector or segmenter."""

from __future__ import annotations

import argparse
from typing import Any

from overlock.cli.options import add_config, add_run_options
from overlock.utils.configs import find_config


def add_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    option = parser.add_argument
    option('checkpoint', help='the weights: a path, a URL, or a published name')
    add_run_options(parser)
    option('--out', metavar='FILE.pkl', help='file for the predictions')
    option('--show-dir', metavar='DIR', help='folder for images with predictions drawn beside the ground truth')
    option('--show', action='store_true', help='show these images in windows')
    option('--tta', action='store_true', help='merge the predictions for several views of each image')
    option('--fast', action='store_true', help='tune the model for inference: the same predictions up to rounding')
    option('--amp', action='store_true', help='run the backbone in bfloat16, with --fast neck and heads too')


def run(config: str, local_rank: str | None = None, **options: Any) -> None:
    path = find_config(config)
    from mmengine_overlock.run import test

    test(path, **options)
