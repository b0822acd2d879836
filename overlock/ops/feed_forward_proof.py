"""Prove the operator of the feed-forward part on this machine by a call: against its layers in float64."""

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops import feed_forward, proof
from overlock.ops.proof import Claim, largest_deviation, probe


def deviation(backend: str, dtype: torch.dtype) -> float:
    """Return the largest deviation of output and gradients, each relative to its largest magnitude.

    The maps, one on each side of `OWN_WEIGHTS_PIXELS`, have several tiles, borders, and a block of channels that is not
    full.

    Args:
        backend: 'eager' for the layers one by one, else the operator.
        dtype: torch.float32 or torch.float64.
    """
    return max(_deviation(backend, dtype, size) for size in ((11, 19), (23, 27)))


def _deviation(backend: str, dtype: torch.dtype, size: tuple[int, int]) -> float:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 20, *size), (20, 1, 3, 3), (20,), (1, 20, 1, 1), (1, 20, 1, 1), (24, 20, 1, 1), (24,))
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    found = _step(tensors, backend != 'eager')
    return largest_deviation(found, _step([tensor.double() for tensor in tensors], False))


def _step(tensors: list[Tensor], fused: bool) -> list[Tensor]:
    """Return output and gradients, of the operator or of the layers."""
    x, taps, bias, gamma, beta, weight, out_bias = tensors = [t.detach().requires_grad_() for t in tensors]
    if fused:
        out = feed_forward.feed_forward(x, taps, bias, gamma, beta, weight, out_bias)
    else:
        y = F.conv2d(F.gelu(x), taps, bias, padding=1, groups=len(taps))
        scale = feed_forward.grn_scale(torch.linalg.vector_norm(y, dim=(2, 3), keepdim=True), gamma)
        out = F.conv2d(y * scale + beta, weight, out_bias)
    return [out.detach(), *torch.autograd.grad(out, tensors, probe(out))]


def is_right(dtype: torch.dtype) -> bool:
    """Return whether the operator is right for maps of a dtype; see `overlock.ops.proof.is_right`."""
    claim = Claim('feed-forward', 'cpp', torch.device('cpu'), dtype, True)
    return proof.is_right(claim, lambda name: deviation(name, dtype))
