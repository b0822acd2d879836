"""The sum of parallel depthwise convolutions, each with the BatchNorm of a training step, as one operator.

The branches are z_i = w_i * x, each normalized by its mean m_i and variance v_i over batch and pixels:

    y = sum_i g_i (z_i - m_i) / s_i + b_i,  s_i = sqrt(v_i + eps).

Once the moments are known, a sum of branches is one convolution, with the kernel sum_i g_i / s_i w_i, the taps of
dilated kernels set apart. The gradient of branch i is

    dz_i = g_i / s_i (dy - mean(dy) - (z_i - m_i) / s_i mean(dy (z_i - m_i) / s_i)),

and the backward pass computes the branches again, some channels at a time. On GPUs (`dilated_triton.py`) that is all of
them, and only x is kept. On CPUs (`dilated_cpp.py`) the map of the largest branch is kept as well, in float32 at least,
with channels padded to multiples of 16: that saves 12 % (9x9) to 24 % (17x17) of the operator's multiply-adds.
"""

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overlock.ops import dilated_cpp, dilated_triton
from overlock.ops.depthwise import IGEMM_ASKED, compute_dtype

# What computes `moments`, `weighted_sum`, `products` and `backward` on each type of device: what `_moments` and so on
# below return. `kept_size` is the shape of what `moments` returns to be kept.
BACKENDS: dict[str, ModuleType] = {'cpu': dilated_cpp, 'cuda': dilated_triton}

# Whether the user turns the operator off.
EAGER_ASKED = os.environ.get('OVERLOCK_DILATED') == 'eager'

Reduce = Callable[[Tensor], Tensor]


class Moments(NamedTuple):
    """Means and biased variances of the branches, (branches, C), float64, and how many values each had, (1,)."""

    mean: Tensor
    variance: Tensor
    size: Tensor


def dilated_norm(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    gains: Sequence[Tensor],
    shifts: Sequence[Tensor],
    eps: float,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Moments]:
    """Sum parallel depthwise convolutions, each normalized over batch and pixels.

    Args:
        x: (B, C, H, W), any float dtype, see `why_unsupported`.
        weights: (C, 1, k, k) of each branch, k odd; the first has the size K, which holds the taps of all others.
        dilations: Distance of the taps of each branch; 1 for the first.
        gains: Scale (C,) of each BatchNorm.
        shifts: Shift (C,) of each.
        eps: Added to the variances.
        reduce: Returns the sum of a tensor over all processes; for BatchNorms that are synchronized.

    Returns:
        The sum (B, C, H, W), in the dtype of autocast where it is on, and the moments, which have no gradient.
    """
    x = x.to(compute_dtype(x))
    y, *moments = _DilatedNorm.apply(x, tuple(dilations), eps, reduce, *weights, *gains, *shifts)
    return y, Moments(*moments)


def why_unsupported(x: Tensor) -> str:
    """Return '' if the operator takes maps such as this one, and was right in a small call of it, or why not.

    Of the map, only device and dtype count.
    """
    if EAGER_ASKED:
        return 'OVERLOCK_DILATED=eager asks for one branch at a time'
    if IGEMM_ASKED and x.is_cuda:
        return 'OVERLOCK_IGEMM=1 asks for another operator'
    backend = BACKENDS.get(x.device.type)
    if backend is None:
        return 'it takes maps on CPUs and CUDA devices'
    if reason := backend.why_unsupported(x):
        return str(reason)
    # It is built on `dilated_norm`.
    from overlock.ops.dilated_proof import is_right

    return '' if is_right(backend.NAME, x.device, compute_dtype(x)) else f'its backend {backend.NAME} is wrong here'


class _DilatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dilations: tuple[int, ...], eps: float, reduce: Reduce | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        branches = len(dilations)
        weights, gains, shifts = (parameters[i : i + branches] for i in range(0, 3 * branches, branches))
        # Of every sample: merged in float64, in which the difference of squares is safe.
        kept, means, squares = _moments(x, weights, dilations)
        count = means.new_full((1,), x.shape[2] * x.shape[3])
        sums = torch.stack([means * count, squares + means.square() * count]).sum(1)
        total = torch.cat([sums.flatten(), count * len(x)])
        total = total if reduce is None else reduce(total)
        count = total[-1:]
        mean, square = (total[:-1] / count).view_as(sums)
        variance = (square - mean.square()).clamp_(min=0)
        inverse = (variance + eps).rsqrt()
        gain = torch.stack(gains)
        scales = gain.double() * inverse
        bias = (torch.stack(shifts).double() - scales * mean).sum(0, keepdim=True)
        y = _weighted_sum(x, kept, weights, dilations, torch.cat([scales, bias]))
        ctx.save_for_backward(x, kept, mean, inverse, count, gain, *weights)
        ctx.dilations, ctx.reduce = dilations, reduce
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, mean, inverse, count, gain, *weights = ctx.saved_tensors
        grad_shift = grad.sum((0, 2, 3), dtype=torch.float64)
        grad_gain = _products(x, grad, kept, weights, ctx.dilations, mean, grad_shift) * inverse
        total = torch.stack([grad_shift, *grad_gain])
        average = (total if ctx.reduce is None else ctx.reduce(total)) / count
        by_grad = gain.double() * inverse
        by_map = -by_grad * inverse * average[1:]
        constant = -by_grad * average[0] - by_map * mean
        coefficients = torch.stack([by_grad, by_map, constant])
        grad_x, grad_taps = _backward(x, grad, kept, weights, ctx.dilations, coefficients)
        counts = [weight.shape[-1] ** 2 for weight in weights]
        grad_weights = [
            part.view_as(weight).to(weight.dtype)
            for part, weight in zip(grad_taps.split(counts, 1), weights, strict=True)
        ]
        # Not one tensor for all: what changes gradients in place, as clipping does, would change it for each.
        grad_shifts = [grad_shift.to(gain.dtype, copy=True) for _ in weights]
        return (grad_x, None, None, None, *grad_weights, *grad_gain.to(gain.dtype), *grad_shifts)


@torch.library.custom_op('overlock::dilated_moments', mutates_args=())
def _moments(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the operators below take as `kept`, and the moments of each branch and sample.

    These are mean and sum of squared deviations, each (B, branches, C), float64.
    """
    kept, mean, squares = BACKENDS[x.device.type].moments(x, weights, dilations)
    return kept, mean, squares


@_moments.register_fake
def _(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    kept = x.new_empty(BACKENDS[x.device.type].kept_size(x), dtype=torch.promote_types(x.dtype, torch.float32))
    moments = x.new_empty((len(x), len(weights), x.shape[1]), dtype=torch.float64)
    return kept, moments, torch.empty_like(moments)


@torch.library.custom_op('overlock::dilated_weighted_sum', mutates_args=())
def _weighted_sum(
    x: Tensor, kept: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], scales: Tensor
) -> Tensor:
    """Return the sum (B, C, H, W) of all branches times their scales, plus a bias.

    Args:
        x, weights, dilations: See `dilated_norm`.
        kept: What `_moments` returned.
        scales: (branches + 1, C), float64; the last is the bias.
    """
    y: Tensor = BACKENDS[x.device.type].weighted_sum(x, kept, weights, dilations, scales)
    return y


@_weighted_sum.register_fake
def _(x: Tensor, kept: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], scales: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op('overlock::dilated_products', mutates_args=())
def _products(
    x: Tensor,
    grad: Tensor,
    kept: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    mean: Tensor,
    grad_sum: Tensor,
) -> Tensor:
    """Return the sum of grad (z_i - mean_i) over batch and pixels, (branches, C), float64.

    Args:
        x, weights, dilations: See `dilated_norm`.
        grad: (B, C, H, W).
        kept: What `_moments` returned.
        mean: (branches, C), float64.
        grad_sum: (C,), float64, of grad.
    """
    sums: Tensor = BACKENDS[x.device.type].products(x, grad, kept, weights, dilations, mean, grad_sum)
    return sums


@_products.register_fake
def _(
    x: Tensor,
    grad: Tensor,
    kept: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    mean: Tensor,
    grad_sum: Tensor,
) -> Tensor:
    return torch.empty_like(mean)


@torch.library.custom_op('overlock::dilated_backward', mutates_args=())
def _backward(
    x: Tensor, grad: Tensor, kept: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the taps of all branches, (C, taps).

    Args:
        x, weights, dilations: See `dilated_norm`.
        grad: (B, C, H, W).
        kept: What `_moments` returned.
        coefficients: (3, branches, C): the gradient of branch z_i is c_0i dy + c_1i z_i + c_2i.
    """
    grad_x, grad_taps = BACKENDS[x.device.type].backward(x, grad, kept, weights, dilations, coefficients)
    return grad_x, grad_taps


@_backward.register_fake
def _(
    x: Tensor, grad: Tensor, kept: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    taps = sum(weight.shape[-1] ** 2 for weight in weights)
    wide = torch.promote_types(x.dtype, torch.float32)
    is_packed = BACKENDS[x.device.type] is dilated_cpp
    grad_x = torch.empty_like(x, memory_format=torch.channels_last if is_packed else torch.preserve_format)
    return grad_x, x.new_empty((x.shape[1], taps), dtype=wide)
