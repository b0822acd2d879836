"""Sizes of maps, enlarged and pooled back, in operations that hold for every size of an exported graph."""

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops.tracing import is_free


def enlarged_size(height: int, width: int, least: int) -> tuple[int, int]:
    """Return the size of a map whose shorter side grows to `least` where it is below, and the other in proportion."""
    # torch.compile does not know the symbolic ones.
    free = is_free(height, width)
    lower, higher, whole = (torch.sym_min, torch.sym_max, torch.sym_int) if free else (min, max, int)
    short = lower(height, width)
    target = higher(short, least)
    # int(target / short * side), not side * target // short: floating-point rounding is part of the network.
    rows, cols = (higher(whole(target / short * side), target) for side in (height, width))
    return rows, cols


def adaptive_avg_pool2d(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average (B, C, H, W) over windows to (B, C, *size), as `torch.nn.functional.adaptive_avg_pool2d`."""
    if not is_free(*x.shape[2:], *size):
        return F.adaptive_avg_pool2d(x, size)
    if size == (1, 1):
        return x.mean((2, 3), keepdim=True)
    rows, cols = (_averages(length, to, x) for length, to in zip(x.shape[2:], size, strict=True))
    return rows @ x @ cols.mT


def _averages(length: int, size: int, like: Tensor) -> Tensor:
    """Return the matrix (size, length) that averages an axis; ONNX has no pooling to a size."""
    # Output i averages from floor(i * length / size) to ceil((i + 1) * length / size).
    position, output = (torch.arange(count, device=like.device) for count in (length, size))
    distance = position * size - output[:, None] * length
    inside = ((distance > -size) & (distance < length)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)
