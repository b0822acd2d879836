"""Folding for inference: a linear step becomes part of the convolution before or after it.

Folding computes in float64 and stores in the dtype of the convolution. A layer that can fold has a method
`switch_to_deploy`; folding twice changes nothing. `overlock.models.names` explains the words.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNorm = _BatchNorm  # for maps of any number of axes, and synchronized ones


@torch.no_grad()
def bn_affine(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the scale and shift (C,), float64, of a BatchNorm in evaluation."""
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    return scale, bn.bias.double() - bn.running_mean.double() * scale


@torch.no_grad()
def fuse_conv_bn(conv: nn.Conv2d, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64, of the one convolution that equals `bn(conv(x))` in evaluation."""
    scale, shift = bn_affine(bn)
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    return conv.weight.double() * scale.view(-1, 1, 1, 1), shift


def set_conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Give a convolution new tensors, in its own dtype; they require gradients if its weight does."""
    dtype, trained = conv.weight.dtype, conv.weight.requires_grad
    conv.weight = nn.Parameter(weight.detach().to(dtype), trained)
    conv.bias = nn.Parameter(bias.detach().to(dtype), trained)


def fold_bn_into_previous(conv: nn.Conv2d, bn: BatchNorm) -> None:
    """Make `conv` compute `bn(conv(x))`."""
    set_conv(conv, *fuse_conv_bn(conv, bn))


@torch.no_grad()
def fold_affine_into_previous(conv: nn.Conv2d, scale: Tensor | float, shift: Tensor) -> None:
    """Make `conv` compute `scale * conv(x) + shift`, both (C,)."""
    scale = torch.as_tensor(scale, dtype=torch.float64, device=conv.weight.device).expand(conv.out_channels)
    bias = shift.double() if conv.bias is None else conv.bias.double() * scale + shift.double()
    set_conv(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias)


@torch.no_grad()
def fold_affine_into_next(scale: Tensor | float, shift: Tensor, conv: nn.Conv2d) -> None:
    """Make a 1x1 `conv` compute `conv(scale * x + shift)`, both (C,).

    Raises:
        ValueError: If `conv` has a window: padding would put zeros where the shift should be.
    """
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        raise ValueError(f'an affine folds into a dense 1x1 convolution without padding alone, got {conv}')
    scale = torch.as_tensor(scale, dtype=torch.float64, device=conv.weight.device).expand(conv.in_channels)
    weight = conv.weight.double()
    bias = weight.flatten(1) @ shift.double()
    if conv.bias is not None:
        bias = bias + conv.bias.double()
    set_conv(conv, weight * scale.view(1, -1, 1, 1), bias)


def fold_bn_into_next(bn: BatchNorm, conv: nn.Conv2d) -> None:
    """Make a 1x1 `conv` compute `conv(bn(x))`."""
    fold_affine_into_next(*bn_affine(bn), conv)


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Fold `model` and every layer below it, in place and idempotently, and return it.

    Do not fold a model that is to train further: folding puts the running statistics into the weights.
    """
    fold = getattr(model, 'switch_to_deploy', None)
    if fold is None:
        switch_children(model)
    else:
        fold()
    return model


def switch_children(module: nn.Module) -> None:
    """Fold the children of `module`; for `switch_to_deploy` methods."""
    for child in module.children():
        switch_to_deploy(child)
