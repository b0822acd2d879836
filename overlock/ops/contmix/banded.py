"""ContMix in a few operations that other runtimes know, for graphs that are used elsewhere.

The windows of one query row lie in K key rows. The tap weights are put where their keys are in these rows, a banded
matrix for each query row, and one product with the values aggregates all: nothing depends on the number of taps but
shapes, and no shape is taken for a constant.
"""

import torch
from torch import Tensor

from overlock.ops.contmix.inputs import Half, Inputs
from overlock.ops.contmix.reference import offsets, windows


def run(inputs: Inputs) -> Tensor:
    """Return the mixed map, (B, C, H, W), for any height and width."""
    return torch.cat([_mix(half) for half in inputs.project().halves()], dim=1)


def _mix(half: Half) -> Tensor:
    """Return the mixed half, (B, G d, H, W)."""
    batch, groups, channels, height, width = half.value.shape
    size = half.size
    rows, cols = (windows(length, size, half.value.device) for length in (height, width))
    # (B, G, H, W, K K), in float32 at least.
    logits = half.query.permute(0, 1, 3, 4, 2) @ half.kernel.unsqueeze(2)
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide) + _position_bias(half, height, width).to(wide)
    weights = logits.softmax(-1).to(half.value.dtype).view(batch, groups, height, width, size, size)
    bands = weights.new_zeros(batch, groups, height, width, size, width)
    bands = bands.scatter(-1, cols[:, None].expand_as(weights), weights)
    # (B, G, H, K W, d): what each query row sees.
    seen = half.value.permute(0, 1, 3, 4, 2).index_select(2, rows.flatten())
    out = bands.view(batch, groups, height, width, size * width) @ seen.reshape(
        batch, groups, height, size * width, channels
    )
    return out.permute(0, 1, 4, 2, 3).reshape(batch, groups * channels, height, width)


def _position_bias(half: Half, height: int, width: int) -> Tensor:
    """Return what is added to the logits, (G, H, W, K K); see `overlock.ops.contmix.eager.position_bias`."""
    cuts = half.rpb.unfold(1, half.size, 1).unfold(2, half.size, 1).flatten(3) + half.bias
    rows, cols = (offsets(length, half.size, half.rpb.device)[:, 0] for length in (height, width))
    return cuts.index_select(1, rows).index_select(2, cols)
