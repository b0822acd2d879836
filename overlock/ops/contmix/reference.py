"""ContMix, slow and obvious: what every other backend is compared with."""

import torch
from torch import Tensor

from overlock.ops.contmix.inputs import Inputs


def why_unavailable() -> str:
    """Return '': the reference runs everywhere."""
    return ''


def why_unsupported(inputs: Inputs) -> str:
    """Return '': the reference takes all inputs."""
    return ''


def run(inputs: Inputs) -> Tensor:
    """Return the mixed map, (B, C, H, W)."""
    value, groups = inputs.value, inputs.num_groups
    batch, _, height, width = value.shape
    query = inputs.query.reshape(batch, groups, -1, height * width) * inputs.scale
    key = inputs.key.reshape(batch, groups, query.shape[2], -1)
    affinity = torch.einsum('bgdn,bgdm->bgnm', query, key)
    logits = torch.einsum('bgnm,tm->bgnt', affinity, inputs.weight) + inputs.bias
    halves = []
    for size, rpb, half_logits, half_value in zip(
        inputs.kernel_sizes,
        (inputs.rpb_small, inputs.rpb_large),
        logits.split([size**2 for size in inputs.kernel_sizes], dim=-1),
        value.chunk(2, dim=1),
        strict=True,
    ):
        halves.append(_mix(half_logits, rpb, half_value.reshape(batch, groups, -1, height, width), size))
    return torch.cat(halves, dim=1)


def window_starts(length: int, kernel_size: int, device: torch.device | None = None) -> Tensor:
    """Return the first position of each query's window on one axis: moved inward near a border, never padded."""
    return (torch.arange(length, device=device) - kernel_size // 2).clamp(0, length - kernel_size)


def _mix(logits: Tensor, rpb: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Mix a value (B, G, d, H, W) by logits (B, G, H W, K^2) and rpb (G, 2K - 1, 2K - 1) to (B, G d, H, W)."""
    batch, groups, _, height, width = value.shape
    taps = torch.arange(kernel_size, device=value.device)
    key_rows, key_cols = (
        window_starts(length, kernel_size, value.device)[:, None] + taps for length in (height, width)
    )
    rpb_rows = key_rows - torch.arange(height, device=value.device)[:, None] + kernel_size - 1
    rpb_cols = key_cols - torch.arange(width, device=value.device)[:, None] + kernel_size - 1
    # (H, W, K, K): query row, query column, tap row, tap column.
    bias = rpb[:, rpb_rows[:, None, :, None], rpb_cols[None, :, None, :]]
    windows = value[:, :, :, key_rows[:, None, :, None], key_cols[None, :, None, :]]
    logits = logits.reshape(batch, groups, height, width, kernel_size, kernel_size) + bias
    weights = logits.flatten(-2).softmax(-1).unflatten(-1, (kernel_size, kernel_size))
    return torch.einsum('bghwkl,bgdhwkl->bgdhw', weights, windows).flatten(1, 2)
