"""Merging for inference: what is linear becomes one convolution."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def fuse_conv_bn(conv: nn.Conv2d, bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """The weight and bias of the one convolution that a convolution and a BatchNorm in evaluation are.

    Computed in float64, whatever the dtype of the parameters.
    """
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    bias = bn.bias.double() - bn.running_mean.double() * scale
    if conv.bias is not None:
        bias = bias + conv.bias.double() * scale
    return conv.weight.double() * scale.view(-1, 1, 1, 1), bias


@torch.no_grad()
def pad_kernel(weight: Tensor, dilation: int, size: int) -> Tensor:
    """A dilated (C, 1, k, k) kernel as the equal undilated (C, 1, size, size) one.

    Raises:
        ValueError: If the dilated kernel is larger than `size`.
    """
    span = (weight.shape[-1] - 1) * dilation + 1
    if span > size or (size - span) % 2:
        raise ValueError(f'a {weight.shape[-1]}x{weight.shape[-1]} kernel with dilation {dilation} spans {span} '
                         f'pixels and does not fit centred into {size}')
    padded = weight.new_zeros((*weight.shape[:2], size, size))
    start = (size - span) // 2
    padded[..., start:start + span:dilation, start:start + span:dilation] = weight
    return padded


def switch_to_deploy(model: nn.Module) -> nn.Module:
    """Merges every mergeable layer below `model` in place, and returns it. Idempotent.

    A model that is to train further must stay unmerged: merging puts the running statistics into the weights.
    """
    for module in list(model.modules()):
        if module is not model and hasattr(module, 'switch_to_deploy'):
            module.switch_to_deploy()
    return model
