"""ContMix in a few operations that other runtimes know, for graphs that are used elsewhere.

The windows of one query row lie in K key rows. The tap weights are put where their keys are in these rows, a banded
matrix for each query row, and one product with the values aggregates all: nothing depends on the number of taps but
shapes, and no shape is taken for a constant.
"""

import torch
from torch import Tensor

from overlock.ops.contmix.inputs import Half, Inputs


def run(inputs: Inputs) -> Tensor:
    """Return the mixed map, (B, C, H, W), for any height and width."""
    x = inputs.project()
    # (B, G, H, W, k^2 + K^2), of both kernels at once.
    logits = x.by_group(x.query).permute(0, 1, 3, 4, 2) @ x.kernel.unsqueeze(2)
    parts = logits.split([size**2 for size in x.kernel_sizes], -1)
    return torch.cat([_mix(half, part) for half, part in zip(x.halves(), parts, strict=True)], dim=1)


def _mix(half: Half, logits: Tensor) -> Tensor:
    """Return the mixed half, (B, G d, H, W), by its logits (B, G, H, W, K^2), to which the biases are added."""
    batch, groups, channels, height, width = half.value.shape
    size = half.size
    (rows, rows_bias), (cols, cols_bias) = (_window(length, size, logits.device) for length in (height, width))
    cuts = half.rpb.unfold(1, size, 1).unfold(2, size, 1).flatten(3) + half.bias
    wide = torch.promote_types(logits.dtype, torch.float32)
    # In float32 at least.
    logits = logits.to(wide) + cuts.index_select(1, rows_bias).index_select(2, cols_bias).to(wide)
    weights = logits.softmax(-1).to(half.value.dtype).view(batch, groups, height, width, size, size)
    bands = weights.new_zeros(batch, groups, height, width, size, width)
    bands = bands.scatter(-1, cols[:, None].expand_as(weights), weights)
    # (B, G, H, K W, d): what each query row sees.
    seen = half.value.permute(0, 1, 3, 4, 2).index_select(2, rows.flatten())
    out = bands.view(batch, groups, height, width, size * width) @ seen.reshape(
        batch, groups, height, size * width, channels
    )
    return out.permute(0, 1, 4, 2, 3).reshape(batch, groups * channels, height, width)


def _window(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return of each query of an axis what its window sees (L, K), and where the window of its bias starts (L,).

    As `overlock.ops.contmix.reference.windows` and the first column of its `offsets`.
    """
    queries = torch.arange(length, device=device)
    starts = (queries - size // 2).clamp(0, length - size)
    return starts[:, None] + torch.arange(size, device=device), starts - queries + (size - 1)
