"""The dilated branches on CPUs: calls `depthwise.cpp`. `dilated.py` says what the functions compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from overlock.ops.compiled import why_not_compiled
from overlock.ops.depthwise import pixels

NAME = 'cpp'


def why_unsupported(x: Tensor) -> str:
    """Return '' if the operators are compiled, else what to do."""
    return why_not_compiled()


def moments(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Tensor, Tensor]:
    mean, squares = torch.ops.overlock_cpu.depthwise_moments(pixels(x, _wide(x)), weights, dilations)
    return mean, squares


def products(
    x: Tensor, grad: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], mean: Tensor, grad_sum: Tensor
) -> Tensor:
    wide = _wide(x)
    found = torch.ops.overlock_cpu.depthwise_products(pixels(x, wide), pixels(grad, wide), weights, dilations)
    return found - mean * grad_sum


def backward(
    x: Tensor, grad: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    grad_x, grad_taps = torch.ops.overlock_cpu.depthwise_backward(
        pixels(x, wide), pixels(grad, wide), weights, dilations, coefficients.to(wide).contiguous()
    )
    return grad_x.permute(0, 3, 1, 2).to(x.dtype), grad_taps


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
