"""Convert the names, form, parts or format of a weight file and print what became of its tensors."""

from __future__ import annotations

import argparse
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option('source', metavar='IN', help='path or URL of the weights, or a name of published ones')
    option('out', metavar='OUT', help='the new file, .pth or .safetensors')
    option('--names', choices=['ours', 'published'], default='ours', help='names to write (default: ours)')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--deploy', dest='form', action='store_const', const='folded', help='fold, for deploy=True')
    form.add_argument('--merge', dest='form', action='store_const', const='merged', help='merge large kernels alone')
    option('--ema', action='store_true', help='take the running average of the weights')
    option('--backbone', action='store_true', help='keep the backbone of a detector or segmenter alone')
    option('--verbose', action='store_true', help='print each tensor')


def run(verbose: bool, **options: Any) -> None:
    from overlock.checkpoint.convert import convert_file

    report = convert_file(**options)
    if verbose:
        print(report.details())
    print(report)
    print(f'verified: {report.verified}')
