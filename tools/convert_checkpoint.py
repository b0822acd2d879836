#!/usr/bin/env python
"""Convert the names, form, parts or format of a weight file and print what became of its tensors."""

import argparse
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from overlock.checkpoint.convert import convert_file
from overlock.utils.distributed import exit_on_user_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
    args = vars(parser.parse_args())
    verbose = args.pop('verbose')
    with exit_on_user_error():
        report = convert_file(**args)
    if verbose:
        print(report.details())
    print(report)
    print(f'verified: {report.verified}')


if __name__ == '__main__':
    main()
