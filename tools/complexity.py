#!/usr/bin/env python
"""Count the parameters and multiply-adds of a detector or segmenter and of its parts."""

import argparse
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine.config import DictAction  # noqa: E402

from mmengine_overlock.complexity import count_config  # noqa: E402
from overlock.utils.distributed import exit_on_user_error  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='file of the configuration')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the image (default: 800 1280 for detectors, 512 2048 for segmenters)',
    )
    parser.add_argument(
        '--training-form', dest='deploy', action='store_false', help='count the backbone before it is folded'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings over those of the configuration',
    )
    with exit_on_user_error():
        print(count_config(**vars(parser.parse_args())))


if __name__ == '__main__':
    main()
