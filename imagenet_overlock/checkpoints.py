"""Checkpoints of training: timm's keys, plain values and tensors only."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet_overlock.recipe import Recipe
from overlock.checkpoint import CheckpointError, find_file, load
from overlock.checkpoint.unpickling import read_pickled
from overlock.utils.errors import UserError
from overlock.utils.files import whole_file

LAST, BEST = 'last.pth', 'best.pth'

_logger = logging.getLogger(__name__)
# What the state of a run depends on; the weight of an auxiliary head may change, but not whether there is one.
_FIXED = ('aux_weight', 'model_ema', 'opt', 'weight_decay', 'layer_decay')
# What may differ between the two parts of a run without making a difference.
_INDIFFERENT = ('log_interval', 'initial_checkpoint', 'pretrained', 'grad_checkpointing')


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint whole or not at all."""
    with whole_file(path) as file:
        torch.save(dict(content), file)


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint of training, on the CPU.

    Raises:
        CheckpointError: If there is no such file, or it is no checkpoint of this training.
    """
    if not Path(path).is_file():
        raise CheckpointError(f'The checkpoint {path} does not exist; give the path of a {LAST}.')
    content = read_pickled(path)
    if not isinstance(content, dict) or not {'epoch', 'arch', 'state_dict', 'args', 'classes'} <= set(content):
        raise CheckpointError(
            f'{path} holds weights, but no state of a training run; start from them with --initial-checkpoint.'
        )
    return content


def training_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint of training tells of its model: `arch`, `args`, `classes`; empty for other weight files."""
    try:
        content = read_checkpoint(path)
    except CheckpointError:
        return {}
    return {name: content[name] for name in ('arch', 'args', 'classes')}


def starting_weights(source: str) -> tuple[dict[str, Tensor], str]:
    """The weights of a file to train from, averaged ones where it is a checkpoint with such, and what to call them.

    Raises:
        CheckpointError: If the file cannot be found or read.
    """
    ema = bool(training_facts(find_file(source)).get('args', {}).get('model_ema'))
    return load(source, ema), f'{source} (EMA)' if ema else source


def find_checkpoint(resume: str | None, output: Path) -> Path | None:
    """The checkpoint that `--resume` means: 'auto' is the last one in `output`, if there is one.

    Raises:
        UserError: If another run lies where this one is to be written.
        CheckpointError: If the checkpoint does not exist.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f'The output {output} is a file, expected a folder; name another one with --output.')
    last = output / LAST
    if resume is None:
        if last.exists():
            raise UserError(f'{last} is there already; go on with --resume, or name another folder with --output.')
        return None
    if resume != 'auto':
        path = Path(resume)
        if not path.is_file():
            raise CheckpointError(f'The checkpoint {path} does not exist; give the path of a {LAST}.')
        if last.exists() and not output.samefile(path.resolve().parent):
            raise UserError(
                f'{last} is of another run than {path} and would be overwritten; name another folder with --output.'
            )
        return path
    if not last.exists():
        _logger.info('There is no %s yet: the run starts anew.', last)
        return None
    return last


def check_resumable(
    content: Mapping[str, Any], path: Path, recipe: Recipe, classes: tuple[str, ...], processes: int
) -> None:
    """Checks that a checkpoint is of the same model and classes; tells of other settings in the log.

    Raises:
        CheckpointError: If it is not.
    """
    if 'optimizer' not in content:
        raise CheckpointError(
            f'{path} is without the state of the optimizer and cannot be resumed; resume {LAST}, or '
            'start from these weights with --initial-checkpoint.'
        )
    if content['arch'] != recipe.model:
        raise CheckpointError(
            f'{path} is of {content["arch"]} and cannot be resumed as {recipe.model}; take the same --model.'
        )
    if tuple(content['classes']) != classes:
        raise CheckpointError(
            f'{path} was trained on other classes ({len(content["classes"])}) than the image folder '
            f'has ({len(classes)}); give the same folder.'
        )
    there, here = content['args'], settings(recipe)
    for name in _FIXED:
        if there[name] != here[name] and (name != 'aux_weight' or not there[name] or not here[name]):
            raise CheckpointError(
                f'{path} was trained with {name} = {there[name]} and cannot be resumed with '
                f'{here[name]}; take the same.'
            )
    changed = [
        f'{name} {there[name]} -> {here[name]}'
        for name in here
        if there.get(name) != here[name] and name not in _INDIFFERENT
    ]
    if content['processes'] != processes:
        changed.append(f'processes {content["processes"]} -> {processes}')
    if changed:
        _logger.warning(
            'Resumed with other settings, so not exactly as without the interruption: %s.', ', '.join(changed)
        )


def settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe as plain values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(recipe).items()}
