#!/usr/bin/env python
"""Export a classifier, detector, segmenter or backbone, and compare the file with PyTorch before it takes its name."""

import argparse
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine_overlock.command_line import add_cfg_options, run_command
from mmengine_overlock.export import FORMATS, export


def make_parser() -> argparse.ArgumentParser:
    """Return the parser, whose options are the arguments of `export`."""
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option('config', help='file of the configuration, or a classifier: overlock_xt, moganet_t, ...')
    option('checkpoint', nargs='?', help='path, URL or published name of the weights (default: random weights)')
    option('--format', choices=FORMATS, default='onnx', help='(default: onnx)')
    option('--out', required=True, metavar='FILE', help='the file to write')
    option('--part', choices=['all', 'backbone'], default='all', help='what to export (default: all)')
    sizes = '`dynamic` for every batch, height and width, or one size (default: dynamic)'
    option('--size', default='dynamic', metavar='HxW', help=sizes)
    option('--images', metavar='PATH', help='an image, or a folder of them, to compare on too')
    option('--preprocessing', action='store_true', help='take RGB pixels (uint8); normalize and pad inside')
    option('--label-map', action='store_true', help='segmenters: give labels instead of logits')
    option('--fp16', action='store_true', help='ONNX, OpenVINO: store weights in float16')
    option('--int8', metavar='DIR', help='ONNX: convolutions in int8, calibrated on the images of a folder')
    add_cfg_options(parser)
    return parser


if __name__ == '__main__':
    print(run_command(export, make_parser()))
