"""Paths that are wrong on purpose; workers load them by name."""

import os

from torch import Tensor, nn

from overlock import contmix


def scaled_output(*args: Tensor, **options) -> Tensor:
    """ContMix, one in a thousand off."""
    return contmix(*args, **options, backend='eager') * 1.001


def detached_key(query: Tensor, key: Tensor, *args: Tensor, **options) -> Tensor:
    """ContMix with the right output, whose key gets no gradient of its own."""
    return contmix(query, key.detach() + 0 * key, *args, **options, backend='eager')


def raises(*args: Tensor, **options) -> Tensor:
    """A backend that cannot."""
    raise RuntimeError('no such kernel')


def dies(*args: Tensor, **options) -> Tensor:
    """A backend that takes its process with it."""
    os._exit(9)


def one_norm_off(model: nn.Module) -> nn.Module:
    """A network with one bias moved."""
    model.output_norms['out0'].bias.data += 1e-3
    return model
