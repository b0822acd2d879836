"""Folding for inference: a linear step becomes part of the convolution before or after it.

Folding computes in float64 and stores in the dtype of the convolution. A layer that can fold has a method
`switch_to_deploy`; folding twice changes nothing. `overlock.models.forms` explains the words.
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
def fuse(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias, float64, of the convolution that equals `scale * conv(x) + shift`, both (C,)."""
    scale, shift = scale.double(), shift.double()
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    return conv.weight.double() * scale.view(-1, 1, 1, 1), bias


def set_conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Give a convolution new tensors, in its own dtype; they require gradients if its weight does."""
    dtype, trained = conv.weight.dtype, conv.weight.requires_grad
    conv.weight = nn.Parameter(weight.detach().to(dtype), trained)
    conv.bias = nn.Parameter(bias.detach().to(dtype), trained)


def fold_into_previous(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Make `conv` compute `scale * conv(x) + shift`, both (C,)."""
    set_conv(conv, *fuse(conv, scale, shift))


@torch.no_grad()
def fold_into_next(scale: Tensor, shift: Tensor, conv: nn.Conv2d) -> None:
    """Make a 1x1 `conv` compute `conv(scale * x + shift)`, both (C,).

    Raises:
        ValueError: If `conv` has a window: padding would put zeros where the shift should be.
    """
    if conv.kernel_size != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
        raise ValueError(f'an affine folds into a dense 1x1 convolution without padding alone, got {conv}')
    weight = conv.weight.double()
    bias = weight.flatten(1) @ shift.double()
    if conv.bias is not None:
        bias = bias + conv.bias.double()
    set_conv(conv, weight * scale.double().view(1, -1, 1, 1), bias)


def switch_children(module: nn.Module) -> None:
    """Fold all that can fold below `module`."""
    for child in module.children():
        fold = getattr(child, 'switch_to_deploy', None)
        if fold is None:
            switch_children(child)
        else:
            fold()
