"""Options that several subcommands have."""

from __future__ import annotations

import argparse
from typing import Any


class Settings(argparse.Action):
    """mmengine's DictAction, imported when it is needed."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        from mmengine.config import DictAction

        DictAction(self.option_strings, self.dest)(parser, namespace, values, option_string)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the configuration."""
    parser.add_argument('config', help='name of a configuration, see `overlock configs`, or path of one of your own')


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the option `--cfg-options`."""
    how = 'settings over those of the configuration, as key=value, key="[a,b]" or key=a,b'
    parser.add_argument('--cfg-options', nargs='+', action=Settings, metavar='KEY=VALUE', help=how)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share."""
    option = parser.add_argument
    option('--work-dir', metavar='DIR', help='folder for logs and checkpoints (default: work_dirs/<name of config>)')
    data = parser.add_mutually_exclusive_group().add_argument
    data('--data-root', metavar='DIR', help='folder of the data, for every data set and evaluator')
    data(
        '--coco', metavar='DIR', help='folder of your own data in COCO format; its classes replace the configured ones'
    )
    data('--masks', metavar='DIR', help='folder of your own images and label maps, likewise')
    option('--no-check', dest='check', action='store_false', help='start without a check of the data')
    option('--compile', action='store_true', help='compile the backbone with torch.compile')
    option('--verbose', action='store_true', help='write the whole log to the terminal, too')
    add_cfg_options(parser)
    launchers = ['none', 'pytorch', 'slurm', 'mpi']
    option('--launcher', choices=launchers, default='none', help='what started the processes of a distributed run')
    # torch.distributed.launch gives it beside the variable LOCAL_RANK, which is the one that counts.
    option('--local-rank', '--local_rank', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
