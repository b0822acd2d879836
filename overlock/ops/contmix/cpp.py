"""ContMix in C++ for CPUs (contmix.cpp), a pixel at a time with its tap weights in registers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops.compiled import LANES, why_not_compiled
from overlock.ops.contmix import library
from overlock.ops.contmix.inputs import Half, Inputs, Projected

KERNEL_SIZES = range(3, 16, 2)

why_unavailable = why_not_compiled


def why_unsupported(inputs: Inputs) -> str:
    """Return '' if the maps are on the CPU and there is code for the kernel sizes, else the reason why not."""
    device = inputs.value.device.type
    if device != 'cpu':
        return f'it runs on the CPU and the maps are on {device}'
    if not set(inputs.kernel_sizes) <= set(KERNEL_SIZES):
        return f'it has kernels of {", ".join(map(str, KERNEL_SIZES))} and kernel_sizes are {inputs.kernel_sizes}'
    return ''


def forward(x: Projected) -> tuple[Tensor, Tensor]:
    """Compute the mixed map and the log-sum-exps; see `overlock.ops.contmix.library.register`."""
    wide = torch.promote_types(x.value.dtype, torch.float32)
    query = _pack(x.by_group(x.query), wide)
    out, lses = torch.empty_like(x.value), []
    for half, to in zip(x.halves(), x.split(out), strict=True):
        kernel, bias, rpb = _padded_taps(half, wide)
        packed, lse = torch.ops.overlock_cpu.contmix_forward(query, kernel, _pack(half.value, wide), bias, rpb)
        _unpack(packed, to)
        lses.append(lse)
    return out, torch.stack(lses)


def backward(grad: Tensor, lse: Tensor, x: Projected) -> Projected:
    """Compute the gradients, with log-sum-exps anew; see `overlock.ops.contmix.library.register`."""
    wide = torch.promote_types(x.value.dtype, torch.float32)
    query = _pack(x.by_group(x.query), wide)
    grads, sums = Projected(*map(torch.empty_like, x)), []
    for half, half_grad, to in zip(x.halves(), x.split(grad), grads.halves(), strict=True):
        kernel, bias, rpb = _padded_taps(half, wide)
        by_tap = _pad(half.kernel.to(wide).mT, query.shape[-1] - half.kernel.shape[2])
        # Channel after channel: what a row of taps sees of one of them is one load, past the map's end at most.
        rows = _pad(half.value.to(wide).flatten(3), kernel.shape[4])
        slopes = torch.ops.overlock_cpu.contmix_backward(_pack(half_grad, wide), query, kernel, by_tap, rows, bias, rpb)
        sums.append(slopes[0])
        to.kernel.copy_(slopes[1][..., : half.size].flatten(3))
        _unpack(slopes[2], to.value)
        to.bias.copy_(slopes[3].sum((0, 1))[:, : half.size].flatten())
        to.rpb.copy_(slopes[4].sum(0)[..., : half.rpb.shape[2]])
    _unpack(sums[0] + sums[1], x.by_group(grads.query))
    return grads


# The operator has the backend's first name, which graphs made by users may contain.
run = library.register('compiled', forward, backward)


def _pack(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, G, H, W, D) of (B, G, d, H, W), D the next multiple of LANES, zeros behind the d."""
    x = x.permute(0, 1, 3, 4, 2)
    packed = x.new_empty((*x.shape[:4], -(-x.shape[4] // LANES) * LANES), dtype=dtype)
    packed[..., : x.shape[4]] = x
    packed[..., x.shape[4] :] = 0
    return packed


def _unpack(packed: Tensor, out: Tensor) -> None:
    """Copy (B, G, H, W, D) to `out`, (B, G, d, H, W)."""
    out.copy_(packed[..., : out.shape[2]].permute(0, 1, 4, 2, 3))


def _padded_taps(half: Half, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return kernel (B, G, d, K, P), bias (K, P) and rpb (G, 2K - 1, K - 1 + P), rows of taps padded to P."""
    size = half.size
    count = (8 if size <= 8 else 16) - size
    return (
        _pad(half.kernel.to(dtype).unflatten(-1, (size, size)), count),
        _pad(half.bias.to(dtype).reshape(size, size), count, float('-inf')),
        _pad(half.rpb.to(dtype), count),
    )


def _pad(x: Tensor, count: int, value: float = 0) -> Tensor:
    """Append `count` times `value` to the last axis; the result is contiguous."""
    # F.pad keeps channels_last strides, and takes (B, G, 1, N) for channels_last where its strides allow that.
    return F.pad(x, (0, count), value=value).contiguous()
