"""ContMix in C++ for CPUs (contmix.cpp): a pixel at a time, its tap weights in registers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops import extension

LANES = 16
KERNEL_SIZES = range(3, 16, 2)


def verify() -> tuple[bool, str]:
    """Whether the extension is built for this machine, and if not, what builds it."""
    return extension.load()


def forward(
    query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, rpb_small: Tensor, rpb_large: Tensor
) -> tuple[Tensor, Tensor]:
    """See `overlock.ops.contmix.library.register`."""
    groups, dims = kernel.shape[1:3]
    wide = torch.promote_types(value.dtype, torch.float32)
    query = _pack(query, groups, wide)
    out, lses = torch.empty_like(value), []
    for taps, half, to in zip(
        _halves(kernel, bias, rpb_small, rpb_large, wide), value.chunk(2, 1), out.chunk(2, 1), strict=True
    ):
        packed, lse = torch.ops.overlock_cpu.contmix_forward(query, taps[0], _pack(half, groups, wide), *taps[1:])
        _unpack(packed, dims, to)
        lses.append(lse)
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
    groups, dims = kernel.shape[1:3]
    wide = torch.promote_types(value.dtype, torch.float32)
    packed_query = _pack(query, groups, wide)
    grad_query, grad_value = torch.empty_like(query), torch.empty_like(value)
    sums, grad_taps, grad_bias, grad_rpb = [], [], [], []
    for taps, half_lse, half, half_grad, to, rpb in zip(
        _halves(kernel, bias, rpb_small, rpb_large, wide),
        lse,
        value.chunk(2, 1),
        grad.chunk(2, 1),
        grad_value.chunk(2, 1),
        (rpb_small, rpb_large),
        strict=True,
    ):
        size, lanes = taps[0].shape[3:]
        by_tap = _pad(taps[0][..., :size].flatten(3).transpose(2, 3), packed_query.shape[-1] - dims)
        # Channel after channel: what a row of taps sees of one of them is one load, past the map's end at most.
        rows = _pad(half.to(wide).flatten(2).unflatten(1, (groups, dims)), lanes)
        grads = torch.ops.overlock_cpu.contmix_backward(
            _pack(half_grad, groups, wide), half_lse.contiguous(), packed_query, taps[0], by_tap, rows, *taps[1:]
        )
        sums.append(grads[0])
        _unpack(grads[2], dims, to)
        grad_taps.append(grads[1][..., :size].flatten(3))
        grad_bias.append(grads[3].sum((0, 1))[:, :size].flatten())
        grad_rpb.append(grads[4].sum(0)[..., : rpb.shape[2]].to(rpb.dtype))
    _unpack(sums[0] + sums[1], dims, grad_query)
    return (
        grad_query,
        torch.cat(grad_taps, -1).to(kernel.dtype),
        grad_value,
        torch.cat(grad_bias).to(bias.dtype),
        *grad_rpb,
    )


def _pack(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """(B, G d, H, W) to (B, G, H, W, D), D the next multiple of LANES."""
    x = x.unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2)
    packed = x.new_empty((*x.shape[:4], -(-x.shape[4] // LANES) * LANES), dtype=dtype)
    packed[..., : x.shape[4]] = x
    packed[..., x.shape[4] :] = 0
    return packed


def _unpack(packed: Tensor, dims: int, out: Tensor) -> None:
    """(B, G, H, W, D) into `out` (B, G d, H, W)."""
    out.unflatten(1, (-1, dims)).copy_(packed[..., :dims].permute(0, 1, 4, 2, 3))


def _halves(
    kernel: Tensor, bias: Tensor, rpb_small: Tensor, rpb_large: Tensor, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each kernel size the kernel (B, G, d, K, P), bias (K, P) and rpb (G, 2K - 1, K - 1 + P), padded."""
    halves, first = [], 0
    for rpb in (rpb_small, rpb_large):
        size = (rpb.shape[1] + 1) // 2
        lanes = 8 if size <= 8 else 16
        taps, first = slice(first, first + size**2), first + size**2
        halves.append(
            (
                _pad(kernel[..., taps].to(dtype).unflatten(-1, (size, size)), lanes - size),
                _pad(bias[taps].to(dtype).reshape(size, size), lanes - size, float('-inf')),
                _pad(rpb.to(dtype), lanes - size),
            )
        )
    return halves


def _pad(x: Tensor, count: int, value: float = 0) -> Tensor:
    """Append `count` times `value` to the last axis; the result is contiguous."""
    # F.pad keeps channels_last strides, and takes (B, G, 1, N) for channels_last where its strides allow that.
    return F.pad(x, (0, count), value=value).contiguous()
