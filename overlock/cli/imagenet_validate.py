"""Validate a classifier on an image folder: top-1, top-5, throughput, confusion of classes."""

from __future__ import annotations

import argparse
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option('data_dir', metavar='DIR', help='image folder with val/CLASS/*.jpg, or the folder val/ itself')
    option('--model', metavar='NAME', help='such as overlock_xt_reparam (default: that which the checkpoint names)')
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument('--pretrained', action='store_true', help='the published weights')
    weights.add_argument('--checkpoint', metavar='FILE', help='a path or URL of weights')
    option('--ema', action='store_true', help='the averaged weights of the checkpoint')
    option('--aux', action='store_true', help='validate the auxiliary head too')
    option('-b', '--batch-size', type=int, default=128, metavar='N', help='batch size of each process (default: 128)')
    option('-j', '--workers', type=int, default=4, metavar='N', help='readers of images in each process (default: 4)')
    option('--img-size', type=int, metavar='N', help='side of the images in pixels (default: that of the training)')
    crop = 'side of the center crop over that of the resized image (default: that of the training; 1.0 above its size)'
    option('--crop-pct', type=float, metavar='X', help=crop)
    option('--amp', action='store_true', help='run in bfloat16')
    option('--device', metavar='NAME', help='cuda or cpu (default: cuda where there is a GPU)')
    option('--confusion', metavar='FILE', help='write the confusion matrix, as .csv or .png')
    option('--results', metavar='FILE.json', help='write the figures')


def run(**options: Any) -> None:
    from imagenet_overlock.distributed import is_first_process, log_to_terminal
    from imagenet_overlock.validate import validate

    log_to_terminal()
    validation = validate(**options)
    if is_first_process():
        print(validation)
