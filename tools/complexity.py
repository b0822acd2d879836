#!/usr/bin/env python
"""Count the parameters and multiply-adds of a detector or segmenter and of its parts."""

import argparse
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine_overlock.command_line import add_cfg_options, run_command
from mmengine_overlock.complexity import count_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option('config', help='file of the configuration')
    size = 'of the image (default: 800 1280 for detectors, 512 2048 for segmenters)'
    option('--size', nargs=2, type=int, metavar=('HEIGHT', 'WIDTH'), help=size)
    option('--training-form', dest='deploy', action='store_false', help='count the backbone before it is folded')
    add_cfg_options(parser)
    print(run_command(count_config, parser))


if __name__ == '__main__':
    main()
