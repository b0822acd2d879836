"""Folding for inference: what is linear becomes part of the convolution before or behind it.

Computed in float64 and stored in the dtype of the convolution. A layer that has something to fold has a method
`switch_to_deploy` for it; folding twice changes nothing.
"""

import torch
from torch import Tensor, nn


@torch.no_grad()
def bn_affine(bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,), float64, that a BatchNorm in evaluation is."""
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    return scale, bn.bias.double() - bn.running_mean.double() * scale


@torch.no_grad()
def fuse_conv_bn(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64, of the one convolution that a convolution and a BatchNorm in evaluation are."""
    scale, shift = bn_affine(bn)
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    return conv.weight.double() * scale.view(-1, 1, 1, 1), shift


def set_conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Gives a convolution new tensors, in its own dtype; they are trained if its weight is."""
    dtype, trained = conv.weight.dtype, conv.weight.requires_grad
    conv.weight = nn.Parameter(weight.detach().to(dtype), trained)
    conv.bias = nn.Parameter(bias.detach().to(dtype), trained)


def fold_bn_into_previous(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm) -> None:
    """Makes `conv` compute `bn(conv(x))`."""
    set_conv(conv, *fuse_conv_bn(conv, bn))


@torch.no_grad()
def fold_affine_into_previous(conv: nn.Conv2d, scale: Tensor | float, shift: Tensor) -> None:
    """Makes `conv` compute `scale * conv(x) + shift`, both (C,)."""
    scale = torch.as_tensor(scale, dtype=torch.float64, device=conv.weight.device).expand(conv.out_channels)
    bias = shift.double() if conv.bias is None else conv.bias.double() * scale + shift.double()
    set_conv(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias)


@torch.no_grad()
def fold_affine_into_next(scale: Tensor | float, shift: Tensor, conv: nn.Conv2d) -> None:
    """Makes a 1x1 `conv` compute `conv(scale * x + shift)`, both (C,).

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


def fold_bn_into_next(bn: nn.modules.batchnorm._BatchNorm, conv: nn.Conv2d) -> None:
    """Makes a 1x1 `conv` compute `conv(bn(x))`."""
    fold_affine_into_next(*bn_affine(bn), conv)


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Folds `model` and every layer below it in place, and returns it. Idempotent.

    A model that is to train further must stay unfolded: folding puts the running statistics into the weights.
    """
    if hasattr(model, 'switch_to_deploy'):
        model.switch_to_deploy()
    else:
        switch_children(model)
    return model


def switch_children(module: nn.Module) -> None:
    """Folds what is below `module`; for the `switch_to_deploy` methods of modules with foldable parts."""
    for child in module.children():
        switch_to_deploy(child)
