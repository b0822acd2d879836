#!/usr/bin/env python
"""Train a detector or segmenter."""

import sys
from pathlib import Path

# A clone that is not installed works too, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine_overlock.command_line import make_parser, run_command
from mmengine_overlock.run import train


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='auto|PATH',
        help='continue from a checkpoint; without a PATH, from the last complete one in the work folder',
    )
    parser.add_argument('--amp', action='store_true', help='train in bfloat16 where the device has it, else in float16')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size'
    )
    parser.add_argument(
        '--weights',
        metavar='FILE',
        help="weights of the backbone, instead of the configuration's: a path, URL or published name",
    )
    parser.add_argument('--tensorboard', action='store_true', help='write scalars for TensorBoard too')
    run_command(train, parser)


if __name__ == '__main__':
    main()
