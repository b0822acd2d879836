#!/usr/bin/env python
"""Train a detector or segmenter."""

import argparse
import os
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine.config import DictAction  # noqa: E402

from mmengine_overlock.run import train  # noqa: E402
from overlock.utils.distributed import exit_on_user_error  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='file of the configuration, see configs/')
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        help='folder for logs and checkpoints (default: work_dirs/<name of the configuration>)',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='auto|PATH',
        help='go on from a checkpoint; without a PATH, from the last whole one in the work folder',
    )
    parser.add_argument('--amp', action='store_true', help='train in bfloat16 where the device has it, else in float16')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size'
    )
    parser.add_argument('--compile', action='store_true', help='compile the backbone with torch.compile')
    parser.add_argument('--data-root', metavar='DIR', help='folder of the data, for every data set and evaluator')
    parser.add_argument(
        '--weights',
        metavar='FILE',
        help="weights of the backbone, instead of the configuration's: a path, URL or published name",
    )
    parser.add_argument('--tensorboard', action='store_true', help='write scalars for TensorBoard too')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='settings over those of the configuration, as key=value, key="[a,b]" or key=a,b',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed run',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = vars(parse_args())
    local_rank = args.pop('local_rank')
    if args['launcher'] == 'pytorch':  # slurm and mpi have variables of their own
        os.environ.setdefault('LOCAL_RANK', str(local_rank))
    with exit_on_user_error():
        train(**args)


if __name__ == '__main__':
    main()
