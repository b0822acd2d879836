"""Depthwise convolution with large kernels."""

import torch
from torch import Tensor
from torch.nn import functional as F

# On a CPU, oneDNN's weight gradient takes K^2 passes; from this kernel size on one correlation by FFT is faster:
# 7 times at 17x17 on a 64x64 map, 7 times at 13x13 on 16x16 (one AVX-512 core, float32).
FFT_MIN_KERNEL = 11


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A depthwise convolution of stride 1 that keeps the size of the map.

    Args:
        x: (B, C, H, W), any float dtype.
        weight: (C, 1, K, K), K odd.
        bias: (C,) or None.

    Returns:
        (B, C, H, W).
    """
    trains = torch.is_grad_enabled() and weight.requires_grad
    if x.device.type == 'cpu' and trains and weight.shape[-1] >= FFT_MIN_KERNEL and not torch.compiler.is_compiling():
        if torch.is_autocast_enabled('cpu'):
            x, weight = (t.to(torch.get_autocast_dtype('cpu')) for t in (x, weight))
        y = _FFTWeightGradient.apply(x, weight)
        return y if bias is None else y + bias.view(-1, 1, 1)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class _FFTWeightGradient(torch.autograd.Function):
    """The same convolution, whose weight gradient is one circular correlation of the padded maps."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = F.conv2d(grad, weight.flip(2, 3), padding=weight.shape[-1] // 2, groups=weight.shape[0])
        return grad_x, _weight_gradient(x, grad, weight.shape[-1]).to(weight.dtype)


def _weight_gradient(x: Tensor, grad: Tensor, kernel_size: int) -> Tensor:
    """(C, 1, K, K): for each offset, the sum over batch and pixels of `grad` times the shifted `x`."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    radius = kernel_size // 2
    # Zeros of at least the radius behind each axis keep the ends from meeting.
    size = [length + radius for length in x.shape[2:]]
    spectrum = torch.fft.rfft2(x.to(wide), s=size) * torch.fft.rfft2(grad.to(wide), s=size).conj()
    correlation = torch.fft.irfft2(spectrum.sum(0), s=size)
    # Maps narrower than the radius never see the outermost offsets: these get zero, and not a wrapped-around value.
    height, width = x.shape[2:]
    rows, cols = min(radius, height - 1), min(radius, width - 1)
    seen = correlation.roll((rows, cols), dims=(1, 2))[:, :2 * rows + 1, :2 * cols + 1]
    return F.pad(seen, (radius - cols,) * 2 + (radius - rows,) * 2).unsqueeze(1)
