"""ContMix in plain PyTorch, for any device and dtype.

The logits never pass through the map of affinities, the bias needs no index tensors, and the backward pass computes the
tap weights again. The derivations are in README.md beside this file.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops.contmix import banded, library
from overlock.ops.contmix.inputs import Half, Inputs, Projected
from overlock.ops.contmix.reference import offsets, windows
from overlock.ops.tracing import is_exporting

# Up to this many times K^2 pixels, one product with a dense (H W, H W) matrix beats K^2 passes over the map.
DENSE_LIMIT = 1.5


def run(inputs: Inputs) -> Tensor:
    """Return the mixed map, (B, C, H, W)."""
    return banded.run(inputs) if is_exporting() else _run(inputs)


def forward(x: Projected) -> tuple[Tensor, Tensor]:
    """Compute the mixed map and the log-sum-exps; see `overlock.ops.contmix.library.register`."""
    out, lses = torch.empty_like(x.value), []
    for half, to in zip(x.halves(), x.split(out), strict=True):
        logits = compute_logits(half)
        lses.append(logits.logsumexp(2))
        weights = _weigh(logits, lses[-1])
        to.copy_(aggregate(weights, half.value))
    return out, torch.stack(lses)


def backward(grad: Tensor, lse: Tensor, x: Projected) -> Projected:
    """Compute the gradients; see `overlock.ops.contmix.library.register`."""
    grad_query, grad_value = torch.zeros_like(x.query), torch.empty_like(x.value)
    grad_kernel, grad_bias, grad_rpb = [], [], []
    for half, half_grad, half_lse, to in zip(x.halves(), x.split(grad), lse, x.split(grad_value), strict=True):
        weights = _weigh(compute_logits(half), half_lse)
        slopes, share = aggregate_backward(weights, half.value, half_grad)
        to.copy_(share)
        slopes.mul_(weights)
        slopes.addcmul_(weights, slopes.sum(2, keepdim=True), value=-1)  # gradient of the logits from here on
        by_tap, by_window = position_bias_backward(slopes.sum(0), half.size)
        grad_bias.append(by_tap)
        grad_rpb.append(by_window.to(half.rpb.dtype))
        slopes = slopes.flatten(3).to(x.query.dtype)
        grad_kernel.append(half.query.flatten(3) @ slopes.mT)
        grad_query += (half.kernel @ slopes).reshape(x.query.shape)
    return Projected(
        grad_query, torch.cat(grad_kernel, -1), grad_value, torch.cat(grad_bias).to(x.bias.dtype), *grad_rpb
    )


_run = library.register('eager', forward, backward)


def compute_logits(half: Half) -> Tensor:
    """Return the logits, (B, G, K^2, H, W), in float32 at least."""
    height, width = half.query.shape[3:]
    logits = (half.kernel.mT @ half.query.flatten(3)).unflatten(-1, (height, width))
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide) + position_bias(half.rpb.to(wide), half.bias.to(wide), height, width)


def _weigh(logits: Tensor, lse: Tensor) -> Tensor:
    """Return the tap weights in place of the logits, (B, G, K^2, H, W)."""
    weights = torch.sub(logits, lse.unsqueeze(2), out=logits).exp_()
    # Of large logits the log-sum-exp is rounded coarsely: their sum takes that out.
    return weights.div_(weights.sum(2, keepdim=True))


def position_bias(rpb: Tensor, tap_bias: Tensor, height: int, width: int) -> Tensor:
    """Return what is added to the logits: from (G, 2K - 1, 2K - 1) and (K^2,) to (G, K^2, H, W).

    Along an axis there are K different windows of the bias: K // 2 near each border and one for all queries between.
    """
    size = (rpb.shape[1] + 1) // 2
    cuts = rpb.unfold(1, size, 1).unfold(2, size, 1).permute(0, 3, 4, 1, 2).flatten(1, 2)
    rows, cols = (offsets(length, size, rpb.device)[:, 0] for length in (height, width))
    return (cuts + tap_bias.view(-1, 1, 1))[:, :, rows][..., cols]


def position_bias_backward(grad: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of tap_bias (K^2,) and rpb (G, 2K - 1, 2K - 1) from (G, K^2, H, W), K being `size`."""
    cuts = _sum_middle(_sum_middle(grad, size, 2), size, 3)
    folded = F.fold(cuts.flip(2, 3).flatten(2), (2 * size - 1, 2 * size - 1), size)
    return cuts.sum((0, 2, 3)), folded.squeeze(1)


def _sum_middle(x: Tensor, length: int, dim: int) -> Tensor:
    """Sum the slices of `x` along `dim` between the first and the last length // 2: `length` slices remain."""
    radius = length // 2
    middle = x.narrow(dim, radius, x.shape[dim] - 2 * radius).sum(dim, keepdim=True)
    return torch.cat([x.narrow(dim, 0, radius), middle, x.narrow(dim, x.shape[dim] - radius, radius)], dim=dim)


def aggregate(weights: Tensor, value: Tensor) -> Tensor:
    """Mix a value (B, G, d, H, W) by tap weights (B, G, K^2, H, W), at least float32, to (B, G, d, H, W)."""
    size, (height, width) = math.isqrt(weights.shape[2]), value.shape[3:]
    if height * width <= DENSE_LIMIT * size**2:
        return (value.flatten(3) @ _dense(weights).to(value.dtype)).unflatten(-1, (height, width))
    value = value.to(weights.dtype)
    out = torch.zeros_like(value)
    for col in range(size):
        seen = _columns(value, size, col)
        for row in range(size):
            tap = weights[:, :, row * size + col, None]
            for queries, keys in _blocks(height, size, row):
                out[..., queries, :].addcmul_(tap[..., queries, :], seen[..., keys, :])
    return out


def aggregate_backward(weights: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `weights` and `value`, both in the dtype of `weights`."""
    size, (height, width) = math.isqrt(weights.shape[2]), value.shape[3:]
    value, grad = value.to(weights.dtype), grad.to(weights.dtype)
    if height * width <= DENSE_LIMIT * size**2:
        grad, value = grad.flatten(3), value.flatten(3)
        slopes = value.mT @ grad
        if height * width != size**2:
            slopes = slopes.gather(2, _dense_index(weights))
        return slopes.view(weights.shape), (grad @ _dense(weights).mT).unflatten(-1, (height, width))
    slopes, grad_value = torch.empty_like(weights), torch.zeros_like(value)
    for col in range(size):
        seen, grad_seen = _columns(value, size, col), torch.zeros_like(value)
        for row in range(size):
            tap = row * size + col
            for queries, keys in _blocks(height, size, row):
                part = grad[..., queries, :]
                slopes[:, :, tap, queries] = (part * seen[..., keys, :]).sum(2)
                share = weights[:, :, tap, None, queries] * part
                grad_seen[..., keys, :] += share.sum_to_size(grad_seen[..., keys, :].shape)
        for queries, keys in _blocks(width, size, col):
            part = grad_seen[..., queries]
            grad_value[..., keys] += part.sum_to_size(grad_value[..., keys].shape)
    return slopes, grad_value


def _dense(weights: Tensor) -> Tensor:
    """Return (B, G, H W, H W), keys by queries, with every tap weight of (B, G, K^2, H, W) at its key."""
    pixels = weights.shape[3] * weights.shape[4]
    if pixels == weights.shape[2]:
        return weights.flatten(3)
    dense = weights.new_zeros(*weights.shape[:2], pixels, pixels)
    return dense.scatter_(2, _dense_index(weights), weights.flatten(3))


def _dense_index(weights: Tensor) -> Tensor:
    """Return (B, G, K^2, H W), the pixel that each tap of each query sees."""
    size, (height, width) = math.isqrt(weights.shape[2]), weights.shape[3:]
    rows, cols = (windows(length, size, weights.device).T for length in (height, width))
    index = rows[:, None, :, None] * width + cols[:, None]
    return index.reshape(size**2, -1).expand(*weights.shape[:2], -1, -1)


def _blocks(length: int, kernel_size: int, tap: int) -> tuple[tuple[slice, slice], ...]:
    """Return for one tap of one axis (queries, keys) of the near border, the interior and the far border.

    All queries at a border share their window, so they see one key.
    """
    radius = kernel_size // 2
    last = length - kernel_size
    return (
        (slice(0, radius), slice(tap, tap + 1)),
        (slice(radius, length - radius), slice(tap, tap + last + 1)),
        (slice(length - radius, length), slice(tap + last, tap + last + 1)),
    )


def _columns(x: Tensor, kernel_size: int, tap: int) -> Tensor:
    """Return what every query column sees at a tap column: from (..., H, W) to the same."""
    return torch.cat(
        [
            x[..., keys].expand(*x.shape[:-1], queries.stop - queries.start)
            for queries, keys in _blocks(x.shape[-1], kernel_size, tap)
        ],
        dim=-1,
    )
