"""The dilated branches on CPUs: calls `depthwise.cpp`. `dilated.py` says what the functions compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from overlock.ops.compiled import LANES, why_not_compiled
from overlock.ops.depthwise import pixels

NAME = 'cpp'


def why_unsupported(x: Tensor) -> str:
    """Return '' if the operators are compiled, else what to do."""
    return why_not_compiled()


def kept_size(x: Tensor) -> tuple[int, ...]:
    """Return the shape of the map of the first branch, as the operators pack it."""
    channels, height, width = x.shape[1:]
    return len(x), -(-channels // LANES), height, width, LANES


def moments(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    kept, mean, squares = torch.ops.overlock_cpu.depthwise_moments(pixels(x, _wide(x)), weights, dilations)
    return kept, mean, squares


def weighted_sum(
    x: Tensor, kept: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], scales: Tensor
) -> Tensor:
    wide = _wide(x)
    scales = scales.to(wide).contiguous()
    y = torch.ops.overlock_cpu.depthwise_weighted_sum(pixels(x, wide), kept, weights, dilations, scales)
    y = y.permute(0, 3, 1, 2)
    return y.to(x.dtype) if x.is_contiguous(memory_format=torch.channels_last) else torch.empty_like(x).copy_(y)


def products(
    x: Tensor,
    grad: Tensor,
    kept: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    mean: Tensor,
    grad_sum: Tensor,
) -> Tensor:
    wide = _wide(x)
    found = torch.ops.overlock_cpu.depthwise_products(pixels(x, wide), pixels(grad, wide), kept, weights, dilations)
    return found - mean * grad_sum


def backward(
    x: Tensor, grad: Tensor, kept: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    grad_x, grad_taps = torch.ops.overlock_cpu.depthwise_backward(
        pixels(x, wide), pixels(grad, wide), kept, weights, dilations, coefficients.to(wide).contiguous()
    )
    return grad_x.permute(0, 3, 1, 2).to(x.dtype), grad_taps


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
