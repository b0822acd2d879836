"""Checkpoints of training: timm's keys, plain values and tensors only."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from imagenet_overlock.recipe import Recipe
from overlock.checkpoint import CheckpointError, find_file, load
from overlock.checkpoint.reading import read
from overlock.utils.errors import UserError
from overlock.utils.finite import non_finite

LAST, BEST = 'last.pth', 'best.pth'

_logger = logging.getLogger(__name__)
# The state of a run depends on these; the weight of an auxiliary head may change, but not whether there is one.
_FIXED = ('model', 'aux_weight', 'model_ema', 'opt', 'weight_decay', 'layer_decay')
# These may differ between the two parts of a run without making a difference.
_INDIFFERENT = ('log_interval', 'on_nan', 'initial_checkpoint', 'pretrained', 'grad_checkpointing', 'ckpt_stg')


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Return a checkpoint of training, on the CPU.

    Raises:
        CheckpointError: If there is no such file, or it is no checkpoint of this training.
    """
    if not Path(path).is_file():
        raise CheckpointError(f'The checkpoint {path} does not exist; give the path of a {LAST}.')
    content = read(path)
    if not _is_of_training(content):
        raise CheckpointError(
            f'{path} holds weights, but no state of a training run; start from them with --initial-checkpoint.'
        )
    return content


def training_facts(path: Path) -> dict[str, Any]:
    """Return `arch`, `args` and `classes` of a checkpoint of training; nothing for other weight files.

    Raises:
        CheckpointError: The file cannot be read.
    """
    content = read(path)
    return {name: content[name] for name in ('arch', 'args', 'classes')} if _is_of_training(content) else {}


def _is_of_training(content: Any) -> bool:
    return isinstance(content, dict) and {'epoch', 'arch', 'state_dict', 'args', 'classes'} <= set(content)


def starting_weights(source: str) -> tuple[dict[str, Tensor], str]:
    """Return weights to train from, averaged ones if the file has them, and their name for messages.

    Raises:
        CheckpointError: If the file cannot be found or read.
    """
    ema = bool(training_facts(find_file(source)).get('args', {}).get('model_ema'))
    return load(source, ema), f'{source} (EMA)' if ema else source


def find_checkpoint(resume: str | None, output: Path) -> Path | None:
    """Return the checkpoint that `--resume` means: 'auto' is the last one in `output`, if there is one.

    Raises:
        UserError: If the output is a file or holds another run.
        CheckpointError: If the checkpoint does not exist.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f'The output {output} is a file, expected a folder; name another one with --output.')
    last = output / LAST
    if resume == 'auto':
        if not last.exists():
            _logger.info('There is no %s yet: the run starts anew.', last)
        return last if last.exists() else None
    if resume is None:
        if last.exists():
            raise UserError(f'{last} is there already; go on with --resume, or name another folder with --output.')
        return None
    path = Path(resume)
    if not path.is_file():
        raise CheckpointError(f'The checkpoint {path} does not exist; give the path of a {LAST}.')
    if last.exists() and not output.samefile(path.resolve().parent):
        raise UserError(
            f'{last} is of another run than {path} and would be overwritten; name another folder with --output.'
        )
    return path


def check_resumable(
    content: Mapping[str, Any], path: Path, recipe: Recipe, classes: tuple[str, ...], processes: int
) -> None:
    """Check that a checkpoint is of the same model and classes; log which other settings differ.

    Raises:
        CheckpointError: If not.
    """
    if 'optimizer' not in content:
        raise CheckpointError(
            f'{path} is without the state of the optimizer and cannot be resumed; resume {LAST}, or '
            'start from these weights with --initial-checkpoint.'
        )
    if found := non_finite(content['state_dict']):
        raise CheckpointError(
            f'{path} holds {len(found)} tensors that are not finite (first {found[0]}); start again, with a lower '
            '--lr-base.'
        )
    if tuple(content['classes']) != classes:
        raise CheckpointError(
            f'{path} was trained on other classes ({len(content["classes"])}) than the image folder '
            f'has ({len(classes)}); give the same folder.'
        )
    there = {**content['args'], 'processes': content['processes']}
    here = {**settings(recipe), 'processes': processes}
    changed = [name for name in here if there.get(name) != here[name] and name not in _INDIFFERENT]
    for name in changed:
        if name in _FIXED and not (name == 'aux_weight' and there[name] and here[name]):
            raise CheckpointError(
                f'{path} was trained with {name} = {there[name]} and cannot be resumed with {here[name]}; '
                'take the same.'
            )
    if changed:
        _logger.warning(
            'Resumed with other settings, so not exactly as without the interruption: %s.',
            ', '.join(f'{name} {there.get(name)} -> {here[name]}' for name in changed),
        )


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe as plain values."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(recipe).items()}
