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
    option = parser.add_argument
    resume = 'continue from a checkpoint; without a PATH, from the last complete one in the work folder'
    option('--resume', nargs='?', const='auto', metavar='auto|PATH', help=resume)
    option('--amp', action='store_true', help='train in bfloat16 where the device has it, else in float16')
    option('--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size')
    option('--weights', metavar='FILE', help='start the backbone from these weights: a path, URL or published name')
    option('--tensorboard', action='store_true', help='write scalars for TensorBoard too')
    on_nan = 'stop, or skip the update, where a loss or a gradient is not finite (default: stop)'
    option('--on-nan', choices=['stop', 'skip'], default='stop', help=on_nan)
    run_command(train, parser)


if __name__ == '__main__':
    main()
