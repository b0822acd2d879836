"""The command lines of `tools/train.py` and `tools/test.py`: the options they share, and mistakes in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mmengine.config import DictAction

from overlock.utils.distributed import exit_on_user_error


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of both tools."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='file of the configuration, see configs/')
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        help='folder for logs and checkpoints (default: work_dirs/<name of the configuration>)',
    )
    parser.add_argument('--data-root', metavar='DIR', help='folder of the data, for every data set and evaluator')
    parser.add_argument('--compile', action='store_true', help='compile the backbone with torch.compile')
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
    # torch.distributed.launch gives it beside the variable LOCAL_RANK, which is the one that counts.
    parser.add_argument('--local-rank', '--local_rank', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def run_command(command: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """Call a function with the options of the command line; a mistake of the user ends the process with code 2."""
    options = vars(parser.parse_args())
    options.pop('local_rank', None)
    with exit_on_user_error():
        command(**options)
