"""Depthwise convolution with large kernels."""

import importlib
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops.compiled import LANES, why_not_compiled
from overlock.ops.tracing import is_unwatched

# On a CPU, oneDNN's weight gradient takes K^2 passes. From these kernel sizes on ours is faster (one AVX-512 core,
# float32): in C++ 5 to 7 times for 5x5 and 7x7 on 56x56 maps, not for 3x3; by FFT 7 times for 17x17 on 64x64.
CPP_MIN_KERNEL = 5
FFT_MIN_KERNEL = 11
# From 15x15 on, maps in channels_last get another of oneDNN's kernels. In that, 13x13 with zeros around it takes half
# the time (two AVX-512 cores, XT's maps of stride 16, PyTorch 2.11).
SLOW_KERNEL = 13
_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == 'AVX512'

# Implicit matrix products on CUDA, from a package that comes with RepLKNet (its fork of CUTLASS) and has to be compiled
# by hand: the package, whether the user asks for it, its autograd functions, and the smallest kernel it is used for,
# as PyTorch has kernels of its own for smaller ones.
IGEMM = 'depthwise_conv2d_implicit_gemm'
IGEMM_ASKED = os.environ.get('OVERLOCK_IGEMM') == '1'
IGEMM_FUNCTIONS = {torch.float32: '_DepthWiseConv2dImplicitGEMMFP32', torch.float16: '_DepthWiseConv2dImplicitGEMMFP16'}
IGEMM_MIN_KERNEL = 7


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Convolve each channel with a kernel of its own, at stride 1, and keep the size of the map.

    Args:
        x: (B, C, H, W), any float dtype.
        weight: (C, 1, K, K), K odd.
        bias: (C,) or None.
        dilation: Distance of the taps.

    Returns:
        (B, C, H, W).

    Raises:
        RuntimeError: If `OVERLOCK_IGEMM=1` asks for a package that cannot be imported.
    """
    device, kernel_size = x.device.type, weight.shape[-1]
    if device not in ('cpu', 'cuda'):
        return same_conv2d(x, weight, bias, dilation)
    dtype = compute_dtype(x)
    # oneDNN (PyTorch 2.11) gives wrong, even infinite weight gradients for dilated kernels in bfloat16, channels_last.
    is_wrong = dilation > 1 and dtype in (torch.bfloat16, torch.float16)
    is_trained = torch.is_grad_enabled() and weight.requires_grad
    fits_igemm = IGEMM_ASKED and dtype in IGEMM_FUNCTIONS and dilation == 1 and kernel_size >= IGEMM_MIN_KERNEL
    if device == 'cpu' and is_trained and (is_wrong or kernel_size >= _min_kernel()):
        y = _OwnWeightGradient.apply(x.to(dtype), weight.to(dtype), dilation)
    elif device == 'cuda' and fits_igemm:
        function = getattr(_igemm(), IGEMM_FUNCTIONS[dtype])
        y = function.apply(x.to(dtype).contiguous(), weight.to(dtype).contiguous())
    else:
        return same_conv2d(x, weight, bias, dilation)
    return y if bias is None else y + bias.view(-1, 1, 1).to(y.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a convolution of `x` computes in: that of autocast where it is on, except for float64."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _min_kernel() -> int:
    return FFT_MIN_KERNEL if why_not_compiled() else CPP_MIN_KERNEL


@cache
def _igemm() -> ModuleType:
    try:
        return importlib.import_module(IGEMM)
    except ImportError as error:
        raise RuntimeError(
            f'OVERLOCK_IGEMM=1 asks for the package {IGEMM}, which does not import here ({error}); '
            'compile it for this PyTorch, or unset the variable'
        ) from error


def same_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    """Convolve as `depthwise_conv2d` does, with PyTorch's gradients."""
    if weight.shape[-1] == SLOW_KERNEL and dilation == 1 and x.device.type == 'cpu' and x.dtype != torch.float64:
        if _HAS_AVX512 and x.is_contiguous(memory_format=torch.channels_last) and is_unwatched():
            weight = F.pad(weight, (1, 1, 1, 1))
    return F.conv2d(
        x, weight, bias, padding=weight.shape[-1] // 2 * dilation, dilation=dilation, groups=weight.shape[0]
    )


class _OwnWeightGradient(torch.autograd.Function):
    """The convolution with our own weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.dilation = dilation
        return same_conv2d(x, weight, None, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x = same_conv2d(grad, weight.flip(2, 3), None, ctx.dilation) if ctx.needs_input_grad[0] else None
        return grad_x, weight_gradient(x, grad, weight.shape[-1], ctx.dilation).to(weight.dtype), None


def pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a map (B, C, H, W) as the C++ operators take it: (B, H, W, C), contiguous."""
    return x.permute(0, 2, 3, 1).to(dtype).contiguous()


def pack_taps(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return kernels (C, 1, k, k) as (taps of all, C), with zeros up to a multiple of LANES."""
    taps = torch.cat([weight.flatten(1) for weight in weights], 1).to(dtype)
    return pad_lanes(taps.T)


def pad_lanes(t: Tensor) -> Tensor:
    """Return a tensor (..., C) with zeros up to a multiple of LANES."""
    return F.pad(t, (0, -t.shape[-1] % LANES)).contiguous()


def taps_of(merged: Tensor, size: int, dilation: int) -> Tensor:
    """Return a view (C, 1, k, k) of the taps of a branch among those of the largest kernel (C, 1, K, K)."""
    margin = merged.shape[-1] // 2 - size // 2 * dilation
    taps = slice(margin, merged.shape[-1] - margin, dilation)
    return merged[..., taps, taps]


# An operator, because torch.compile would decompose the complex arithmetic into slower code.
@torch.library.custom_op('overlock::depthwise_weight_gradient', mutates_args=())
def weight_gradient(x: Tensor, grad: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Return for each tap the sum over batch and pixels of `grad` times shifted `x`.

    Args:
        x: (B, C, H, W), the convolution's input.
        grad: (B, C, H, W), the gradient of its output.
        kernel_size: K, odd.
        dilation: Distance of the taps.

    Returns:
        (C, 1, K, K), at least float32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if not x.numel():
        # MKL has no transform of nothing.
        return x.new_zeros((x.shape[1], 1, kernel_size, kernel_size), dtype=wide)
    if x.device.type == 'cpu' and not why_not_compiled():
        taps = torch.ops.overlock_cpu.depthwise_correlate(pixels(x, wide), pixels(grad, wide), kernel_size, dilation)
        return taps.view(-1, 1, kernel_size, kernel_size)
    reach = kernel_size // 2 * dilation
    # One circular correlation. Zeros of at least the reach behind each axis keep the ends from meeting.
    size = [length + reach for length in x.shape[2:]]
    # Inside an operator a compiled graph ignores the lazy conj().
    spectrum = torch.fft.rfft2(x.to(wide), s=size) * torch.conj_physical(torch.fft.rfft2(grad.to(wide), s=size))
    correlation = torch.fft.irfft2(spectrum.sum(0), s=size)
    # Maps narrower than the reach never see the outermost offsets: these get zero instead of a wrapped-around value.
    height, width = x.shape[2:]
    rows, cols = min(reach, height - 1), min(reach, width - 1)
    seen = correlation.roll((rows, cols), dims=(1, 2))[:, : 2 * rows + 1, : 2 * cols + 1]
    offsets = F.pad(seen, (reach - cols,) * 2 + (reach - rows,) * 2)
    return offsets[:, ::dilation, ::dilation].unsqueeze(1).contiguous()


@weight_gradient.register_fake
def _(x: Tensor, grad: Tensor, kernel_size: int, dilation: int) -> Tensor:
    return x.new_empty((x.shape[1], 1, kernel_size, kernel_size), dtype=torch.promote_types(x.dtype, torch.float32))
