"""ContMix, slow and obvious: what every other backend is compared with."""

from collections.abc import Callable

import torch
from torch import Tensor

from overlock.ops.contmix.inputs import Inputs


def run(inputs: Inputs) -> Tensor:
    """Return the mixed map, (B, C, H, W)."""
    query = inputs.query.flatten(2).unflatten(1, (inputs.num_groups, -1)) * inputs.scale
    key = inputs.key.flatten(2).unflatten(1, (inputs.num_groups, -1))
    affinity = torch.einsum('bgdn,bgdm->bgnm', query, key)
    return mix(inputs, torch.einsum('bgnm,tm->bgnt', affinity, inputs.weight) + inputs.bias, aggregate_windows)


def mix(inputs: Inputs, logits: Tensor, aggregate: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    """Mix the value by logits (B, G, H W, k^2 + K^2), to which the position bias is added.

    `aggregate` takes tap weights (B, G, H, W, K^2), values (B, G, d, H, W) and K, and sums these under those.
    """
    height, width = inputs.value.shape[2:]
    halves = []
    for size, rpb, half_logits, value in zip(
        inputs.kernel_sizes,
        (inputs.rpb_small, inputs.rpb_large),
        logits.unflatten(2, (height, width)).split([size**2 for size in inputs.kernel_sizes], dim=-1),
        inputs.value.chunk(2, dim=1),
        strict=True,
    ):
        rows, cols = (offsets(length, size, rpb.device) for length in (height, width))
        # (H, W, K, K): query row, query column, tap row, tap column.
        index = rows[:, None, :, None] * (2 * size - 1) + cols[None, :, None, :]
        weights = (half_logits + take(rpb.flatten(1), index)).softmax(-1)
        halves.append(aggregate(weights, value.unflatten(1, (inputs.num_groups, -1)), size).flatten(1, 2))
    return torch.cat(halves, dim=1)


def aggregate_windows(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Sum values under tap weights; see `mix`."""
    height, width = value.shape[3:]
    rows, cols = (windows(length, kernel_size, value.device) for length in (height, width))
    seen = take(value.flatten(3), rows[:, None, :, None] * width + cols[None, :, None, :])
    return torch.einsum('bghwt,bgdhwt->bgdhw', weights, seen)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Return (..., H, W, K^2), what an index (H, W, K, K) takes from the last axis."""
    # Unlike that of indexing, the gradient of gather is summed in one order on CPUs.
    taken = x.gather(-1, index.flatten().expand(*x.shape[:-1], -1))
    return taken.unflatten(-1, index.shape).flatten(-2)


def windows(length: int, kernel_size: int, device: torch.device | None = None) -> Tensor:
    """Return (L, K), what each query's window sees on one axis: moved inward near a border, never padded."""
    starts = (torch.arange(length, device=device) - kernel_size // 2).clamp(0, length - kernel_size)
    return starts[:, None] + torch.arange(kernel_size, device=device)


def offsets(length: int, kernel_size: int, device: torch.device | None = None) -> Tensor:
    """Return (L, K), where the position bias of each tap of each query is on one axis: key - query + K - 1."""
    queries = torch.arange(length, device=device)[:, None]
    return windows(length, kernel_size, device) - queries + kernel_size - 1
