"""The published pipeline, rebuilt from our parts; every speed is compared with it.

It computes what the formulas say, step by step: ContMix keeps the map of affinities and all tap weights in memory and
looks up the position bias by index, dilated branches are not merged, maps are contiguous (NCHW) and gradients are
PyTorch's own.
"""

import copy
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import GRN, ChannelAffine, ConvFFN, DilatedReparamConv, LayerNorm2d
from overlock.layers.conv import DepthwiseConv, PointwiseConv
from overlock.models.blocks import DynamicBlock
from overlock.models.overlock import Trunk
from overlock.ops.contmix.inputs import Inputs
from overlock.ops.contmix.natten import aggregate_natten, why_unavailable
from overlock.ops.contmix.reference import mix


def published(model: Trunk, device: torch.device | str = 'cpu') -> Trunk:
    """Return a copy of a model of ours that runs the published pipeline on the same parameters and buffers.

    Args:
        model: `OverLoCK` or `OverLoCKBackbone`, not merged; it is left as it is.
        device: Where the copy will run; see `aggregation`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    twin.memory_format = torch.contiguous_format
    for module in twin.modules():
        if isinstance(module, DynamicBlock):
            module.operator = partial(contmix, aggregate=aggregation(device))
        elif type(module) in FORWARDS:
            module.forward = MethodType(FORWARDS[type(module)], module)
    return twin


def aggregation(device: torch.device | str) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return natten's kernel where it can run, else its usual replacement, an unfold."""
    # The only build that a recent torch imports is the one for CPUs.
    return aggregate_unfold if torch.device(device).type != 'cpu' or why_unavailable() else aggregate_natten


def contmix(
    *tensors: Any, aggregate: Callable[[Tensor, Tensor, int], Tensor], backend: str = '', **options: Any
) -> Tensor:
    """Compute ContMix in the published steps.

    Arguments, shapes and result are those of `overlock.ops.contmix`, of which `backend` counts for nothing here;
    `aggregate` sums values under tap weights.
    """
    x = Inputs(*tensors, **options)
    query = (x.query * x.scale).flatten(2).unflatten(1, (x.num_groups, -1))
    key = x.key.flatten(2).unflatten(1, (x.num_groups, -1))
    affinity = torch.einsum('bgdn,bgdm->bgnm', query, key).permute(0, 3, 1, 2).contiguous()
    logits = F.conv2d(affinity, x.weight[:, :, None, None], x.bias).permute(0, 2, 3, 1)
    return mix(x, logits, aggregate)


def aggregate_unfold(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Sum values under tap weights with an unfold; queries near the border share the outermost windows."""
    batch, groups, dims, height, width = value.shape
    radius = kernel_size // 2
    windows = F.unfold(value.flatten(0, 1), kernel_size)
    windows = windows.reshape(batch * groups, -1, height - 2 * radius, width - 2 * radius)
    windows = F.pad(windows, (radius,) * 4, mode='replicate')
    windows = windows.reshape(batch, groups, dims, kernel_size**2, height, width)
    return torch.einsum('bghwt,bgdthw->bgdhw', weights.to(value.dtype), windows)


def _ffn(self: ConvFFN, x: Tensor) -> Tensor:
    """Keep every map for the backward pass."""
    return self.fc2(self.grn(self.dwconv(self.act(self.fc1(x)))))


def _dilated_conv(self: DilatedReparamConv, x: Tensor) -> Tensor:
    """Compute a convolution and a BatchNorm for each branch, summed one by one, with PyTorch's gradients."""
    y = self.bn(self.conv(x))
    for branch in self.branches.values():
        y = y + branch(x)
    return y


def _layer_norm(self: LayerNorm2d, x: Tensor) -> Tensor:
    """Permute twice, each time with a copy."""
    y = x.permute(0, 2, 3, 1).contiguous()
    y = F.layer_norm(y, self.normalized_shape, self.weight, self.bias, self.eps)
    return y.permute(0, 3, 1, 2).contiguous()


def _grn(self: GRN, x: Tensor) -> Tensor:
    """Compute the formula step by step."""
    response = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    response = response / (response.mean(dim=1, keepdim=True) + 1e-6)
    return (self.gamma * response + 1) * x + self.beta


def _channel_affine(self: ChannelAffine, x: Tensor, addend: Tensor | None = None) -> Tensor:
    """Compute a depthwise 1x1 convolution."""
    y = F.conv2d(x, self.weight, self.bias, groups=x.shape[1])
    return y if addend is None else y + addend


# Our other layers already compute what the authors' do, in the same steps.
FORWARDS: dict[type, Callable[..., Tensor]] = {
    ConvFFN: _ffn,
    DepthwiseConv: nn.Conv2d.forward,
    PointwiseConv: nn.Conv2d.forward,
    DilatedReparamConv: _dilated_conv,
    LayerNorm2d: _layer_norm,
    GRN: _grn,
    ChannelAffine: _channel_affine,
}
