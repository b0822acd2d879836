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
    option = parser.add_argument
    option('checkpoint', help='the weights: a path, a URL, or a published name')
    option('--out', metavar='FILE.pkl', help='file for the predictions')
    option('--show-dir', metavar='DIR', help='folder for images with predictions drawn beside the ground truth')
    option('--show', action='store_true', help='show these images in windows')
    option('--tta', action='store_true', help='merge the predictions for several views of each image')
    option('--amp', action='store_true', help='run the backbone in bfloat16')
    run_command(test, parser)


if __name__ == '__main__':
    main()
