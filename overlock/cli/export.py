"""Export a classifier, detector, segmenter or backbone; the file is compared with PyTorch before it takes its name."""

from __future__ import annotations

import argparse
import re
from typing import Any

from overlock.cli.options import add_cfg_options
from overlock.utils.configs import find_config


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option('config', help='name or path of a configuration, or a classifier: overlock_xt, moganet_t, ...')
    option('checkpoint', nargs='?', help='path, URL or published name of the weights (default: random weights)')
    formats = ['onnx', 'exported-program', 'openvino', 'tensorrt']
    option('--format', choices=formats, default='onnx', help='(default: onnx)')
    option('--out', required=True, metavar='FILE', help='the file to write')
    option('--part', choices=['all', 'backbone'], default='all', help='what to export (default: all)')
    sizes = '`dynamic` for every batch, height and width, or one size (default: dynamic)'
    option('--size', default='dynamic', metavar='HxW', help=sizes)
    option('--images', metavar='PATH', help='an image, or a folder of them, to compare on too')
    option('--data-root', metavar='DIR', help='folder of the data: score the file and PyTorch on the test set too')
    option('--preprocessing', action='store_true', help='take RGB pixels (uint8); normalize inside')
    option('--label-map', action='store_true', help='segmenters: give labels instead of logits')
    option('--fp16', action='store_true', help='ONNX, OpenVINO: store weights in float16')
    option('--int8', metavar='DIR', help='ONNX: convolutions in int8, calibrated on the images of a folder')
    add_cfg_options(parser)


def run(config: str, **options: Any) -> None:
    # Configurations name a head first.
    path = config if re.fullmatch('(overlock|moganet)_[a-z]+', config) else find_config(config)
    from mmengine_overlock.export import export

    print(export(path, **options))
