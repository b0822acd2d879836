"""The norm of each channel over space."""

from typing import Any, cast

import torch
from torch import Tensor

from overlock.ops.tracing import is_eager

# Elements of a map that are squared at a time: 1 MiB in float32, which stays in a core's cache.
CHUNK = 2**18


def spatial_norm(x: Tensor) -> Tensor:
    """Return the L2 norm of each channel of each sample over height and width.

    Args:
        x: (B, C, H, W), any float dtype.

    Returns:
        (B, C, 1, 1), float64 for float64 maps, else float32: a sum of squares over a map leaves float16's range.
    """
    # PyTorch's reduction over the outer axes of a channels_last map is scalar code on CPUs: 29 against 5 ms for
    # 1x224x200x336 on two AVX-512 cores.
    if x.device.type == 'cpu' and is_eager() and not x.is_contiguous():
        return cast(Tensor, _ChunkedNorm.apply(x))
    return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


class _ChunkedNorm(torch.autograd.Function):
    """The norm, computed a few rows of the map at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = max(1, CHUNK * x.shape[2] // max(1, x.numel()))
        squares = [part.to(wide).square().sum((2, 3), keepdim=True) for part in x.split(rows, 2)]
        norm = torch.stack(squares).sum(0).sqrt()
        ctx.save_for_backward(x, norm)
        return norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, norm = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        return x * (grad / norm).masked_fill_(norm == 0, 0).to(x.dtype)
