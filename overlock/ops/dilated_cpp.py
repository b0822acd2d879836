"""The dilated branches on CPUs: calls `depthwise.cpp`. `dilated.py` says what the functions compute."""

from collections.abc import Sequence

import torch
from torch import Tensor

from overlock.ops.compiled import why_not_compiled
from overlock.ops.depthwise import pack_taps, pad_lanes, pixels, taps_of, weight_gradient

NAME = 'cpp'


def why_unsupported(x: Tensor) -> str:
    """Return '' if the operators are compiled, else what to do."""
    return why_not_compiled()


def moments(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = [weight.shape[-1] for weight in weights]
    found = torch.ops.overlock_cpu.depthwise_moments(pixels(x, wide), pack_taps(weights, wide), sizes, dilations)
    mean, squares = (t[..., : x.shape[1]].contiguous() for t in found)
    return mean, squares


def products(
    x: Tensor, grad: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], mean: Tensor, grad_sum: Tensor
) -> Tensor:
    # The correlation at the taps of the largest kernel, which holds those of all branches.
    taps = weight_gradient(x, grad, weights[0].shape[-1], 1).double()
    found = [
        (taps_of(taps, weight.shape[-1], dilation) * weight).sum((1, 2, 3))
        for weight, dilation in zip(weights, dilations, strict=True)
    ]
    return torch.stack(found) - mean * grad_sum


def backward(
    x: Tensor, grad: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    sizes = [weight.shape[-1] for weight in weights]
    taps = pack_taps(weights, wide)
    grad_x, grad_taps = torch.ops.overlock_cpu.depthwise_backward(
        pixels(x, wide), pixels(grad, wide), taps, sizes, dilations, *pad_lanes(coefficients.to(wide))
    )
    return grad_x.permute(0, 3, 1, 2).to(x.dtype), grad_taps.sum(0)[:, : x.shape[1]].T.contiguous()
