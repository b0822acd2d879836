"""Fold a trained detector or segmenter for deployment, write its configuration and compare the predictions."""

from __future__ import annotations

import argparse
from typing import Any

from overlock.cli.options import add_cfg_options, add_config
from overlock.utils.configs import find_config


def add_options(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    option = parser.add_argument
    option('checkpoint', help='path or URL of the weights, or a name of published ones')
    option('out', metavar='OUT.pth', help='the new weights; the configuration is written to OUT.py')
    option('--image', metavar='FILE', help='the image to compare the results on (default: a drawn scene)')
    option('--ema', action='store_true', help='take the running average of the weights')
    add_cfg_options(parser)


def run(config: str, **options: Any) -> None:
    path = find_config(config)
    from mmengine_overlock.deploy import reparameterize

    print(reparameterize(path, **options))
