"""Build classifiers, load their weights, compute the logits of both heads."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, cast

import timm
from torch import Tensor

from overlock.checkpoint import CheckpointError, load, load_state_dict

# This import registers the models.
from overlock.timm import TimmMogaNet, TimmOverLoCK
from overlock.utils.errors import UserError

_logger = logging.getLogger(__name__)

Classifier = TimmOverLoCK | TimmMogaNet


def create_model(
    name: str, num_classes: int, aux_head: bool, drop_path: float = 0.0, pretrained: bool = False
) -> Classifier:
    """Build a classifier from timm's registry; published weights get new classifiers unless there are 1000 classes.

    Raises:
        UserError: If there is no such model, or it has no auxiliary head.
        CheckpointError: If the weights cannot be found.
    """
    check_model(name)
    if aux_head and name.startswith('moganet'):
        raise UserError(f'{name} has no auxiliary head; train with aux_weight 0, and validate without --aux.')
    heads: dict[str, Any] = {'aux_head': True} if aux_head else {}
    model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, drop_path_rate=drop_path, **heads)
    return cast(Classifier, model)


def check_model(name: str) -> None:
    """Check that there is a model of this name, or of this name with the tag of its weights: `moganet_t.in1k_256`.

    Raises:
        UserError: If not.
    """
    names = timm.list_models(['overlock_*', 'moganet_*'], pretrained='.' in name)
    if name not in names:
        raise UserError(f'There is no model {name}; the models are {", ".join(names)}.')


def load_weights(model: Classifier, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load weights to train from; heads start anew where the file has other classes, or no auxiliary head.

    Raises:
        CheckpointError: If the weights are not of this model.
    """
    given, own = model.to_own_names(state_dict), model.state_dict()
    new = [name for name in own if name.startswith('aux_head.') and name not in given]
    last = tuple(f'{classifier}.' for classifier in model.classifiers)
    new += [name for name in own if name.startswith(last) and given.get(name, own[name]).shape != own[name].shape]
    load_state_dict(model, {**given, **{name: own[name] for name in new}}, source)
    if new:
        modules = ', '.join(sorted({name.rpartition('.')[0] for name in new}))
        _logger.info('%s start anew: %s has them for other classes, or not at all.', modules, source)


def load_for_validation(
    model_name: str, source: str | os.PathLike, num_classes: int, aux_head: bool, ema: bool
) -> Classifier:
    """Build a classifier with the weights, or their running average, from a published name, path or URL.

    Raises:
        CheckpointError: If the file is not of this model or has other classes.
    """
    model = create_model(model_name, num_classes, aux_head)
    given = model.to_own_names(load(source, ema=ema))
    if aux_head and not any(name.startswith('aux_head.') for name in given):
        raise CheckpointError(f'{source} has no auxiliary head; leave out --aux.')
    weight = given.get(f'{model.classifiers[0]}.weight')
    if weight is not None and len(weight) != num_classes:
        raise CheckpointError(
            f'{source} has {len(weight)} classes, but the image folder has {num_classes}; give '
            'the folder that it was trained on, or train on this one first.'
        )
    load_state_dict(model, given, os.fspath(source))
    return model


def both_logits(model: Classifier, images: Tensor) -> dict[str, Tensor]:
    """Return `main` logits, and `aux` logits where the model has that head, in evaluation too.

    Args:
        model: Classifier of `create_model`.
        images: (B, 3, H, W).
    """
    if isinstance(model, TimmMogaNet) or model.aux_head is None:
        return {'main': model(images)}
    outs, overview = model.encode(images)
    return {'main': model.forward_head(outs[3]), 'aux': model.aux_head(overview).flatten(1)}
