"""ContMix in plain PyTorch, for any device and dtype.

The logits never pass through the map of affinities, the bias needs no index tensors, and only the tap weights and
the values are kept for the backward pass. The derivations are in README.md beside this file.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# Up to this many times K^2 pixels, one product with a dense (H W, H W) matrix beats K^2 passes over the map.
DENSE_LIMIT = 1.5


def verify() -> tuple[bool, str]:
    """Plain PyTorch runs everywhere."""
    return True, ''


def contmix(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, rpb_small: Tensor,
            rpb_large: Tensor, kernel_sizes: tuple[int, int], num_groups: int, scale: float,
            aggregation: Callable[[Tensor, Tensor, int], Tensor] | None = None) -> Tensor:
    """See `overlock.ops.contmix`; `aggregation` stands in for `aggregate`."""
    aggregation = aggregation or aggregate
    batch, _, height, width = value.shape
    query = query.reshape(batch, num_groups, -1, height * width)
    key = key.reshape(batch, num_groups, query.shape[2], -1)
    # Affinities and their projection are linear, so the regions are projected and not the affinities of every pixel.
    kernels = (scale * key) @ weight.t()
    taps = [size ** 2 for size in kernel_sizes]
    halves = []
    for size, rpb, kernel, tap_bias, half in zip(kernel_sizes, (rpb_small, rpb_large), kernels.split(taps, dim=-1),
                                                 bias.split(taps), value.chunk(2, dim=1), strict=True):
        logits = (kernel.transpose(-2, -1) @ query).unflatten(-1, (height, width))
        logits = logits + position_bias(rpb, tap_bias, size, height, width)
        half = half.reshape(batch, num_groups, -1, height, width)
        halves.append(aggregation(tap_softmax(logits), half, size).flatten(1, 2))
    return torch.cat(halves, dim=1)


def tap_softmax(logits: Tensor) -> Tensor:
    """Softmax over the taps of (B, G, K^2, H, W), in float32 at least."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.softmax(dim=2, dtype=wide)


def position_bias(rpb: Tensor, tap_bias: Tensor, kernel_size: int, height: int, width: int) -> Tensor:
    """What is added to the logits: (G, 2K-1, 2K-1) and (K^2,) to (G, K^2, H, W).

    Along an axis the window of the bias is one of K: K // 2 of them near each border, one everywhere between.
    """
    windows = rpb.unfold(1, kernel_size, 1).unfold(2, kernel_size, 1).flip(1, 2)
    windows = windows.permute(0, 3, 4, 1, 2).flatten(1, 2) + tap_bias.view(-1, 1, 1)
    return _repeat_middle(_repeat_middle(windows, height, 2), width, 3)


def _repeat_middle(x: Tensor, length: int, dim: int) -> Tensor:
    """Repeats the middle slice of `x` along `dim` until it is `length` long."""
    radius = x.shape[dim] // 2
    sizes = list(x.shape)
    sizes[dim] = length - 2 * radius
    middle = x.narrow(dim, radius, 1).expand(sizes)
    return torch.cat([x.narrow(dim, 0, radius), middle, x.narrow(dim, radius + 1, radius)], dim=dim)


def aggregate(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Weights (B, G, K^2, H, W), at least float32, and value (B, G, d, H, W) to (B, G, d, H, W) in value's dtype."""
    height, width = value.shape[-2:]
    if height * width <= DENSE_LIMIT * kernel_size ** 2:
        return _aggregate_dense(weights, value, kernel_size)
    return _AggregateTaps.apply(weights, value.to(weights.dtype), kernel_size).to(value.dtype)


def _aggregate_dense(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """One matrix product: every tap weight at its place in an (H W, H W) matrix, keys by queries."""
    height, width = value.shape[-2:]
    pixels = height * width
    if pixels != kernel_size ** 2:
        rows, cols = ((torch.arange(length, device=value.device) - kernel_size // 2).clamp(0, length - kernel_size)
                      for length in (height, width))
        taps = torch.arange(kernel_size, device=value.device)
        index = ((taps.view(-1, 1, 1, 1) + rows.view(-1, 1)) * width + taps.view(-1, 1, 1) + cols)
        index = index.reshape(kernel_size ** 2, pixels).expand(*weights.shape[:2], -1, -1)
        dense = weights.new_zeros(*weights.shape[:2], pixels, pixels)
        dense = dense.scatter(2, index, weights.flatten(-2))
    else:
        dense = weights.flatten(-2)
    return (value.flatten(-2) @ dense.to(value.dtype)).unflatten(-1, (height, width))


def _blocks(length: int, kernel_size: int, tap: int) -> tuple[tuple[slice, slice], ...]:
    """For one tap of one axis: (queries, keys) of the near border, the interior and the far border.

    All queries at a border share their window, so they see one key.
    """
    radius = kernel_size // 2
    last = length - kernel_size
    return ((slice(0, radius), slice(tap, tap + 1)),
            (slice(radius, length - radius), slice(tap, tap + last + 1)),
            (slice(length - radius, length), slice(tap + last, tap + last + 1)))


def _columns(x: Tensor, kernel_size: int, tap: int) -> Tensor:
    """What every query column sees at a tap column: (..., H, W) to the same."""
    return torch.cat([x[..., keys].expand(*x.shape[:-1], queries.stop - queries.start)
                      for queries, keys in _blocks(x.shape[-1], kernel_size, tap)], dim=-1)


class _AggregateTaps(torch.autograd.Function):
    """K^2 passes over the map, one a tap; keeps nothing but its inputs for the backward pass."""

    @staticmethod
    def forward(ctx, weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
        ctx.save_for_backward(weights, value)
        ctx.kernel_size = kernel_size
        out = torch.zeros_like(value)
        for col in range(kernel_size):
            seen = _columns(value, kernel_size, col)
            for row in range(kernel_size):
                tap = weights[:, :, row * kernel_size + col, None]
                for queries, keys in _blocks(value.shape[-2], kernel_size, row):
                    out[..., queries, :].addcmul_(tap[..., queries, :], seen[..., keys, :])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, value = ctx.saved_tensors
        size = ctx.kernel_size
        grad_weights, grad_value = torch.empty_like(weights), torch.zeros_like(value)
        for col in range(size):
            seen, grad_seen = _columns(value, size, col), torch.zeros_like(value)
            for row in range(size):
                tap = row * size + col
                for queries, keys in _blocks(value.shape[-2], size, row):
                    part = grad[..., queries, :]
                    grad_weights[:, :, tap, queries] = (part * seen[..., keys, :]).sum(2)
                    share = weights[:, :, tap, None, queries] * part
                    grad_seen[..., keys, :] += share.sum_to_size(grad_seen[..., keys, :].shape)
            for queries, keys in _blocks(value.shape[-1], size, col):
                part = grad_seen[..., queries]
                grad_value[..., keys] += part.sum_to_size(grad_value[..., keys].shape)
        return grad_weights, grad_value, None
