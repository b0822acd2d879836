"""ContMix in plain PyTorch, for any device and dtype.

The logits never pass through the map of affinities, the bias needs no index tensors, and the backward pass computes the
tap weights again. The derivations are in README.md beside this file.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops.contmix.reference import window_starts

# Up to this many times K^2 pixels, one product with a dense (H W, H W) matrix beats K^2 passes over the map.
DENSE_LIMIT = 1.5


def verify() -> tuple[bool, str]:
    """Plain PyTorch runs everywhere."""
    return True, ''


def forward(
    query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, rpb_small: Tensor, rpb_large: Tensor
) -> tuple[Tensor, Tensor]:
    """See `overlock.ops.contmix.library.register`."""
    out, lses = torch.empty_like(value), []
    for taps, tap_bias, rpb, half, to in halves(kernel, bias, rpb_small, rpb_large, value, out):
        logits = compute_logits(query, taps, tap_bias, rpb, half.shape[3:])
        lses.append(logits.logsumexp(2))
        weights = torch.sub(logits, lses[-1].unsqueeze(2), out=logits).exp_()
        to.copy_(aggregate(weights, half))
    return out, torch.stack(lses)


def backward(
    grad: Tensor,
    lse: Tensor,
    query: Tensor,
    kernel: Tensor,
    value: Tensor,
    bias: Tensor,
    rpb_small: Tensor,
    rpb_large: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `overlock.ops.contmix.library.register`."""
    grad_value, grad_query = torch.empty_like(value), torch.zeros_like(query)
    grad_taps, grad_bias, grad_rpb = [], [], []
    parts = halves(kernel, bias, rpb_small, rpb_large, value, grad_value)
    for (taps, tap_bias, rpb, half, to), half_grad, half_lse in zip(parts, grad.chunk(2, 1), lse, strict=True):
        logits = compute_logits(query, taps, tap_bias, rpb, half.shape[3:])
        weights = torch.sub(logits, half_lse.unsqueeze(2), out=logits).exp_()
        slopes, share = aggregate_backward(weights, half, half_grad.unflatten(1, half.shape[1:3]))
        to.copy_(share)
        slopes.mul_(weights)
        slopes.addcmul_(weights, slopes.sum(2, keepdim=True), value=-1)  # gradient of the logits from here on
        by_tap, by_window = position_bias_backward(slopes.sum(0), rpb.shape[1])
        grad_bias.append(by_tap)
        grad_rpb.append(by_window.to(rpb.dtype))
        slopes = slopes.flatten(3).to(query.dtype)
        grad_taps.append(query.flatten(2).unflatten(1, taps.shape[1:3]) @ slopes.mT)
        grad_query += (taps @ slopes).reshape(query.shape)
    return grad_query, torch.cat(grad_taps, -1), grad_value, torch.cat(grad_bias).to(bias.dtype), *grad_rpb


def plain(query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, rpb_small: Tensor, rpb_large: Tensor) -> Tensor:
    """The output alone, out of place and with any height and width: what `torch.export` and ONNX can express."""
    outs = []
    for taps, tap_bias, rpb, half, _ in halves(kernel, bias, rpb_small, rpb_large, value, value):
        weights = compute_logits(query, taps, tap_bias, rpb, half.shape[3:]).softmax(2).to(value.dtype)
        size = (rpb.shape[1] + 1) // 2
        rows, cols = (
            window_starts(length, size, value.device).unsqueeze(1) + torch.arange(size, device=value.device)
            for length in half.shape[3:]
        )
        out = 0
        for row, weight in zip(rows.unbind(1), weights.unflatten(2, (size, size)).unbind(2), strict=True):
            seen = half[:, :, :, row][..., cols]  # (B, G, d, H, W, K)
            out = out + (seen * weight.movedim(2, -1).unsqueeze(2)).sum(-1)
        outs.append(out.flatten(1, 2))
    return torch.cat(outs, 1)


def halves(kernel: Tensor, bias: Tensor, rpb_small: Tensor, rpb_large: Tensor, value: Tensor, out: Tensor):
    """For each kernel size its part of the inputs, and of `value` and `out` (B, G, d, H, W)."""
    taps = [((rpb.shape[1] + 1) // 2) ** 2 for rpb in (rpb_small, rpb_large)]
    maps = (t.unflatten(1, (2, *kernel.shape[1:3])).unbind(1) for t in (value, out))
    return zip(kernel.split(taps, -1), bias.split(taps), (rpb_small, rpb_large), *maps, strict=True)


def compute_logits(query: Tensor, kernel: Tensor, bias: Tensor, rpb: Tensor, size: tuple[int, int]) -> Tensor:
    """Query (B, G d, H, W) and kernel (B, G, d, K^2) to the logits (B, G, K^2, H, W), in float32 at least."""
    logits = (kernel.mT @ query.flatten(2).unflatten(1, kernel.shape[1:3])).unflatten(-1, size)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide) + position_bias(rpb.to(wide), bias.to(wide), *size)


def position_bias(rpb: Tensor, tap_bias: Tensor, height: int, width: int) -> Tensor:
    """What is added to the logits: (G, 2K-1, 2K-1) and (K^2,) to (G, K^2, H, W).

    Along an axis the window of the bias is one of K: K // 2 of them near each border, one everywhere between.
    """
    size = (rpb.shape[1] + 1) // 2
    windows = rpb.unfold(1, size, 1).unfold(2, size, 1).permute(0, 3, 4, 1, 2).flatten(1, 2)
    rows, cols = (
        window_starts(length, size, rpb.device) - torch.arange(length, device=rpb.device) + size - 1
        for length in (height, width)
    )
    return (windows + tap_bias.view(-1, 1, 1))[:, :, rows][..., cols]


def position_bias_backward(grad: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(G, K^2, H, W) to the gradients of tap_bias (K^2,) and rpb (G, 2K-1, 2K-1), 2K-1 being `length`."""
    size = (length + 1) // 2
    windows = _sum_middle(_sum_middle(grad, size, 2), size, 3)
    folded = F.fold(windows.flip(2, 3).flatten(2), (length, length), size)
    return windows.sum((0, 2, 3)), folded.squeeze(1)


def _sum_middle(x: Tensor, length: int, dim: int) -> Tensor:
    """Sums the slices of `x` along `dim` behind which all but length // 2 at each end are one: `length` are left."""
    radius = length // 2
    middle = x.narrow(dim, radius, x.shape[dim] - 2 * radius).sum(dim, keepdim=True)
    return torch.cat([x.narrow(dim, 0, radius), middle, x.narrow(dim, x.shape[dim] - radius, radius)], dim=dim)


def aggregate(weights: Tensor, value: Tensor) -> Tensor:
    """Tap weights (B, G, K^2, H, W), at least float32, and value (B, G, d, H, W) to (B, G, d, H, W)."""
    size, (height, width) = _kernel_size(weights), value.shape[3:]
    if _is_dense(size, height, width):
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
    """The gradients of `weights` and `value`, both in the dtype of `weights`."""
    size, (height, width) = _kernel_size(weights), value.shape[3:]
    value, grad = value.to(weights.dtype), grad.to(weights.dtype)
    if _is_dense(size, height, width):
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


def _kernel_size(weights: Tensor) -> int:
    return round(weights.shape[2] ** 0.5)


def _is_dense(kernel_size: int, height: int, width: int) -> bool:
    return height * width <= DENSE_LIMIT * kernel_size**2


def _dense(weights: Tensor) -> Tensor:
    """(B, G, K^2, H, W) to (B, G, H W, H W), keys by queries: every tap weight at its key."""
    pixels = weights.shape[3] * weights.shape[4]
    if pixels == weights.shape[2]:
        return weights.flatten(3)
    dense = weights.new_zeros(*weights.shape[:2], pixels, pixels)
    return dense.scatter_(2, _dense_index(weights), weights.flatten(3))


def _dense_index(weights: Tensor) -> Tensor:
    """(B, G, K^2, H W): the pixel that each tap of each query sees."""
    size, (height, width) = _kernel_size(weights), weights.shape[3:]
    rows, cols = (window_starts(length, size, weights.device) for length in (height, width))
    taps = torch.arange(size, device=weights.device)
    index = (taps.view(-1, 1, 1, 1) + rows.view(-1, 1)) * width + taps.view(-1, 1, 1) + cols
    return index.reshape(size**2, -1).expand(*weights.shape[:2], -1, -1)


def _blocks(length: int, kernel_size: int, tap: int) -> tuple[tuple[slice, slice], ...]:
    """For one tap of one axis: (queries, keys) of the near border, the interior and the far border.

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
    """What every query column sees at a tap column: (..., H, W) to the same."""
    return torch.cat(
        [
            x[..., keys].expand(*x.shape[:-1], queries.stop - queries.start)
            for queries, keys in _blocks(x.shape[-1], kernel_size, tap)
        ],
        dim=-1,
    )
