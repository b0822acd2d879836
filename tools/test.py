#!/usr/bin/env python
"""Evaluate a trained detector or segmenter."""

import sys
from pathlib import Path

# A clone that is not installed works too, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine_overlock.command_line import make_parser, run_command
from mmengine_overlock.run import test


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', help='the weights: a path, a URL, or a published name')
    parser.add_argument('--out', metavar='FILE.pkl', help='file for the predictions')
    parser.add_argument(
        '--show-dir', metavar='DIR', help='folder for images with the predictions drawn beside the ground truth'
    )
    parser.add_argument('--show', action='store_true', help='show these images in windows')
    parser.add_argument('--tta', action='store_true', help='merge the predictions for several views of each image')
    parser.add_argument('--amp', action='store_true', help='run the backbone in bfloat16')
    run_command(test, parser)


if __name__ == '__main__':
    main()
