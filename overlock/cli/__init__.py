"""The command `overlock`; the scripts in tools/ are its subcommands.

Each subcommand is a module here with `add_options(parser)` and `run(**options)`, which returns an exit code or None.
Nothing heavy is imported before `run`: help and mistakes are told at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from overlock import __version__
from overlock.utils.distributed import exit_on_user_error
from overlock.utils.threads import wait_briefly

# Names of subcommands and what they do, in the order of the help.
COMMANDS = {
    'train': 'train a detector or segmenter',
    'test': 'evaluate a trained detector or segmenter',
    'predict': 'predict images, folders and videos',
    'export': 'export to ONNX, torch.export or OpenVINO, compared with PyTorch',
    'data': 'report what a data set has and what is wrong with it',
    'convert': 'convert a weight file',
    'reparameterize': 'fold a trained detector or segmenter for deployment',
    'complexity': 'count parameters and multiply-adds',
    'configs': 'list the configurations, or copy one',
    'doctor': 'check this machine: versions, operators, GPUs, folders',
    'imagenet-train': 'train a classifier',
    'imagenet-validate': 'validate a classifier',
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of this process, and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = arguments[0] if arguments else ''
    if name in COMMANDS:
        return run_command(name, arguments[1:], f'overlock {name}')
    parser = argparse.ArgumentParser('overlock', description='OverLoCK and MogaNet for detection and segmentation.')
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(metavar='COMMAND', required=True)
    for command, help in COMMANDS.items():
        commands.add_parser(command, help=help)
    parser.parse_args(arguments or ['--help'])
    return 0


def run_command(name: str, arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a subcommand with its arguments, by default those of this process, and return its exit code.

    A mistake of the user is one sentence and ends the process with code 2.
    """
    command = _module(name)
    parser = argparse.ArgumentParser(prog, description=command.__doc__)
    command.add_options(parser)
    options = vars(parser.parse_args(arguments))
    wait_briefly()
    with exit_on_user_error():
        return command.run(**options) or 0


def _module(name: str) -> ModuleType:
    return import_module(f'overlock.cli.{name.replace("-", "_")}')
