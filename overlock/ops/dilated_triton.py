"""The dilated branches on GPUs: launches `dilated_kernels.py`. `dilated.py` says what the functions compute.

A packed copy of the input lives as long as a call; gradients of branches live in a scratch that is small enough for the
second-level cache, some blocks of channels at a time. Weight gradients are partial sums that PyTorch adds up: without
atomics, two runs are equal to the last bit.

An estimate, as nothing was measured on a GPU: the dilated branches of a training step at 2x3x800x1344 in bfloat16. One
by one, each branch reads and writes its map in the convolution, in BatchNorm and in the sum; the operator reads packed
tiles once for each branch. For a backward pass the branches keep (branches + 1) maps, the operator one.

| | XT | S |
| --- | --- | --- |
| bytes moved, one by one; here (here if the cache serves repeated reads) | 11.8 GB; 6.3 (1.3) | 39.2 GB; 21.1 (4.5) |
| multiply-adds, one by one; here | 0.049; 0.075 T | 0.166; 0.253 T |
| maps kept, one by one; here | 0.70; 0.09 GB | 2.35; 0.30 GB |
| one by one, H100 and A100: bytes alone | 3.5 and 5.9 ms | 12 and 20 ms |
| the same: taps at two loads each, as in PyTorch's own depthwise kernels | 13 and 20 ms | 45 and 68 ms |
| here: loads of the compiled kernels from the first-level cache | 7.2 and 11 ms | 24 and 37 ms |

The last two rows take 32 loaded words a clock and multiprocessor, and for the kernels here 6 loads of 16 bytes for 32
multiply-adds (9 for 64 in `tap_grad`); the merged convolution, which is PyTorch's, is counted alike. So memory is what
this saves for certain; time only where depthwise convolutions are far from the memory's speed.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overlock.ops.compiled import LANES
from overlock.ops.depthwise import pack_taps, pad_lanes, same_conv2d, taps_of
from overlock.ops.gpu import interpreted, why_no_triton, why_not_on_gpu

NAME = 'triton'
# Bytes of gradients of branches at a time, unless a single block of channels of one image takes more.
SCRATCH = 64 * 2**20
# Registers of a thread.
REGISTERS = 168
# About how many programs sum the gradients of taps.
PROGRAMS = 4096


class Frame(NamedTuple):
    """Sizes of a map and of the packed one, in which zeros stand around it."""

    H: int
    W: int
    HEIGHT: int
    WIDTH: int
    CHANNELS: int
    BLOCKS: int  # of LANES channels
    REACH: int  # zeros above and on the left; there are as many or more on the other sides


class Constants(NamedTuple):
    """Compile-time constants of kernels."""

    ROWS: int = 8
    COLS: int = 16
    LANES: int = LANES
    UNROLL: int = 2
    TAPS: int = 8  # whose gradients a program sums
    WARPS: int = 2


TILE = Constants()
# Tiles that share registers with TAPS sums.
SMALL_TILE = Constants(ROWS=4, WARPS=4)


def why_unsupported(x: Tensor) -> str:
    """Return '' if Triton runs here and takes this map, else the reason why not."""
    if x.dtype == torch.float64 and not interpreted():
        return 'it takes maps of at most float32'
    return why_no_triton() or why_not_on_gpu(x)


def kept_size(x: Tensor) -> tuple[int, ...]:
    """Return the shape of nothing: the other functions compute all branches again."""
    return (0,)


def moments(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        frame, branches, taps = _prepare(x, weights, dilations)
        tiles = _tiles(frame.H, frame.W)
        partial = taps.new_empty(2, len(weights), len(x), frame.BLOCKS, tiles, LANES)
        _launch('moments', (_units(x, frame) * tiles, len(weights)), frame, _pack(x, frame), taps, branches, partial)
        means, squares = partial.double()
        # Merged as in Chan et al., 1983.
        rows, cols = (
            (length - torch.arange(0, length, size, device=x.device)).clamp_(max=size)
            for length, size in ((frame.H, TILE.ROWS), (frame.W, TILE.COLS))
        )
        counts = rows.outer(cols).view(-1, 1)
        mean = (means * counts).sum(3) / counts.sum()
        total = (squares + (means - mean.unsqueeze(3)).square() * counts).sum(3)
    return taps.new_empty(kept_size(x)), _channels(mean, x), _channels(total, x)


def weighted_sum(
    x: Tensor, kept: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], scales: Tensor
) -> Tensor:
    kernel = _merge_kernels([weight.double() for weight in weights], dilations, list(scales[:-1]))
    y = same_conv2d(x, kernel.to(x.dtype), scales[-1].to(x.dtype))
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def products(
    x: Tensor,
    grad: Tensor,
    kept: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    mean: Tensor,
    grad_sum: Tensor,
) -> Tensor:
    with torch.cuda.device_of(x):
        frame, branches, taps = _prepare(x, weights, dilations)
        tiles = _tiles(frame.H, frame.W)
        partial = taps.new_empty(len(weights), len(x), frame.BLOCKS, tiles, LANES)
        grid = _units(x, frame) * tiles, len(weights)
        means = pad_lanes(mean.to(taps.dtype))
        packed = _pack(x, frame)
        _launch('products', grid, frame, packed, taps, branches, grad, grad.stride(), means, partial)
        found = _channels(partial.sum(3, dtype=torch.float64), x).sum(0)
        # The means that the kernel subtracts are rounded.
        return found + (means[:, : x.shape[1]].double() - mean) * grad_sum


def backward(
    x: Tensor, grad: Tensor, kept: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(x):
        frame, branches, taps = _prepare(x, weights, dilations)
        packed, factors, grad_x = _pack(x, frame), pad_lanes(coefficients.to(taps.dtype)), torch.empty_like(x)
        count, units = len(weights), _units(x, frame)
        groups = _groups(tuple(weight.shape[-1] for weight in weights), x.device)
        plane = count * frame.HEIGHT * frame.WIDTH * LANES
        # At least one, also of an empty map.
        step = max(1, min(units, SCRATCH // (plane * x.element_size())))
        scratch = x.new_zeros(step, plane)
        tiles, most = _tiles(frame.H, frame.W), _tiles(frame.H, frame.W, SMALL_TILE)
        span = -(-most // min(most, -(-PROGRAMS // (step * len(groups)))))
        parts = -(-most // span)
        partial = taps.new_empty(units, parts, len(taps), LANES)
        for first in range(0, units, step):
            these = min(step, units - first)
            grid = these * tiles, count
            slopes = grad, grad.stride(), factors
            _launch('branch_grad', grid, frame, packed, taps, branches, *slopes, scratch, first)
            target = grad_x, grad_x.stride(), first, count
            _launch('input_grad', grid[:1], frame, scratch, taps, branches, *target)
            grid = these * parts, len(groups)
            sums_of = partial, first, count, len(taps), span
            _launch('tap_grad', grid, frame, packed, scratch, branches, groups, *sums_of, constants=SMALL_TILE)
        sums = partial.sum(1).view(len(x), frame.BLOCKS, len(taps), LANES).sum(0)
    return grad_x, sums.transpose(1, 2).flatten(0, 1)[: x.shape[1]].contiguous()


def _merge_kernels(weights: Sequence[Tensor], dilations: Sequence[int], scales: Sequence[Tensor]) -> Tensor:
    """Return the kernel (C, 1, K, K) of a sum of depthwise convolutions, each times its scale (C,)."""
    merged = weights[0] * scales[0].view(-1, 1, 1, 1)
    for weight, dilation, scale in zip(weights[1:], dilations[1:], scales[1:], strict=True):
        taps_of(merged, weight.shape[-1], dilation).add_(weight * scale.view(-1, 1, 1, 1))
    return merged


def _prepare(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Frame, Tensor, Tensor]:
    """Return the sizes of maps, size, dilation and first tap of each branch, and all taps, (taps, C)."""
    taps = pack_taps(weights, torch.promote_types(x.dtype, torch.float32))
    channels, height, width = x.shape[1:]
    reach = weights[0].shape[-1] // 2
    rows, cols = (-(-length // size) * size for length, size in ((height, TILE.ROWS), (width, TILE.COLS)))
    frame = Frame(height, width, rows + 2 * reach, cols + 2 * reach, channels, taps.shape[1] // LANES, reach)
    return frame, _branches(tuple(weight.shape[-1] for weight in weights), tuple(dilations), x.device), taps


# Kept, as a CUDA graph that is captured takes no new data from the CPU.
@cache
def _branches(sizes: tuple[int, ...], dilations: tuple[int, ...], device: torch.device) -> Tensor:
    first = [sum(size**2 for size in sizes[:i]) for i in range(len(sizes))]
    return torch.tensor([*zip(sizes, dilations, first, strict=True)], dtype=torch.int32, device=device)


@cache
def _groups(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the branch and the first of its taps for each group of taps."""
    groups = [(i, tap) for i, size in enumerate(sizes) for tap in range(0, size**2, SMALL_TILE.TAPS)]
    return torch.tensor(groups, dtype=torch.int32, device=device)


def _pack(x: Tensor, frame: Frame) -> Tensor:
    target = x.new_empty(_units(x, frame), frame.HEIGHT, frame.WIDTH, LANES)
    _launch('pack', (len(target) * _tiles(frame.HEIGHT, frame.WIDTH),), frame, x, x.stride(), target)
    return target


def _channels(sums: Tensor, x: Tensor) -> Tensor:
    """Return (B, branches, C) of (branches, B, blocks, LANES)."""
    return sums.transpose(0, 1).flatten(2)[..., : x.shape[1]].contiguous()


def _units(x: Tensor, frame: Frame) -> int:
    return len(x) * frame.BLOCKS


def _tiles(height: int, width: int, constants: Constants = TILE) -> int:
    return -(-height // constants.ROWS) * -(-width // constants.COLS)


def _kernels() -> ModuleType:
    from overlock.ops import dilated_kernels

    return dilated_kernels


def _launch(name: str, grid: tuple[int, ...], *arguments: Any, constants: Constants = TILE) -> None:
    # Without the limit the assembler spills registers to save a few.
    options = dict(C=constants, num_warps=constants.WARPS, maxnreg=REGISTERS)
    getattr(_kernels(), name)[grid](*arguments, **options)
