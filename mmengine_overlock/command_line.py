"""The command lines of tools: the options they share, and mistakes in one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mmengine.config import DictAction

from overlock.utils.distributed import exit_on_user_error


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the option `--cfg-options`."""
    how = 'settings over those of the configuration, as key=value, key="[a,b]" or key=a,b'
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help=how)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that train.py and test.py share."""
    parser = argparse.ArgumentParser(description=description)
    option = parser.add_argument
    option('config', help='file of the configuration, see configs/')
    option('--work-dir', metavar='DIR', help='folder for logs and checkpoints (default: work_dirs/<name of config>)')
    option('--data-root', metavar='DIR', help='folder of the data, for every data set and evaluator')
    option('--no-check', dest='check', action='store_false', help='start without a check of the data')
    option('--compile', action='store_true', help='compile the backbone with torch.compile')
    add_cfg_options(parser)
    launchers = ['none', 'pytorch', 'slurm', 'mpi']
    option('--launcher', choices=launchers, default='none', help='what started the processes of a distributed run')
    # torch.distributed.launch gives it beside the variable LOCAL_RANK, which is the one that counts.
    option('--local-rank', '--local_rank', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def run_command(command: Callable[..., Any], parser: argparse.ArgumentParser) -> Any:
    """Call a function with the options of the command line; a mistake of the user ends the process with code 2."""
    options = vars(parser.parse_args())
    options.pop('local_rank', None)
    with exit_on_user_error():
        return command(**options)
