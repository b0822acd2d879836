"""The last four layers of a feed-forward part as one operator: GELU, depthwise 3x3 and 1x1 convolution, GRN between.

    y = conv(GELU(x)),  s = gamma N / mean(N) + 1,  N = |y| over space (ConvNeXt V2),  out = W (s y + beta) + b.

Each sample has scales of its own. On large maps they go into its weights, s W, which are smaller; so their gradient
comes from that of these weights, dout y^T, which is computed anyway. On small maps they multiply y. Only x is kept: the
backward pass computes y again, and its gradient, s W^T dout + (dN / N) y, row by row.
"""

from typing import Any, cast

import torch
from torch import Tensor

from overlock.ops.compiled import why_not_compiled
from overlock.ops.depthwise import pack_taps, pad_lanes, pixels
from overlock.ops.pointwise import pointwise_conv2d
from overlock.ops.tracing import is_unwatched

# From as many pixels a sample's scales go into weights of its own. On two AVX-512 cores a training step then takes 0.9
# to 1.0 of the time for 28x28 to 64x64 maps, and 1.1 for 14x14.
OWN_WEIGHTS_PIXELS = 512


def feed_forward(
    x: Tensor, taps: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor | None, weight: Tensor, out_bias: Tensor
) -> Tensor:
    """Apply GELU, a depthwise 3x3 convolution, global response normalization and a 1x1 convolution.

    Args:
        x: (B, D, H, W), see `takes`.
        taps, bias: (D, 1, 3, 3) and (D,) of the depthwise convolution.
        gamma, beta: (1, D, 1, 1) of GRN; beta may be None.
        weight, out_bias: (C, D, 1, 1) and (C,) of the 1x1 convolution.

    Returns:
        (B, C, H, W), channels_last.
    """
    out = _FeedForward.apply(x, taps, bias, gamma, beta, weight, out_bias)
    return cast(Tensor, out)


def takes(x: Tensor) -> bool:
    """Return whether the operator takes this map: on a CPU, in float32 or float64, and not empty.

    The first map of a dtype proves it, see `overlock.ops.proof`.
    """
    if x.device.type != 'cpu' or not is_unwatched() or why_not_compiled():
        return False
    is_wide = x.dtype == torch.float64 or (x.dtype == torch.float32 and not torch.is_autocast_enabled('cpu'))
    if not (is_wide and x.numel()):
        return False
    # It is built on `feed_forward`.
    from overlock.ops.feed_forward_proof import is_right

    return is_right(x.dtype)


def grn_scale(norm: Tensor, gamma: Tensor) -> Tensor:
    """Return the scale of GRN, `gamma * N / mean(N) + 1`, for norms N (B, D, 1, 1)."""
    scale, _, _ = _grn_parts(norm, gamma)
    return scale


def _grn_parts(norm: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scale, N / mean(N) and mean(N), 1e-6 added to it."""
    mean = norm.mean(dim=1, keepdim=True) + 1e-6
    share = norm / mean
    return gamma * share + 1, share, mean


class _FeedForward(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type='cpu')
    def forward(
        ctx: Any,
        x: Tensor,
        taps: Tensor,
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        weight: Tensor,
        out_bias: Tensor,
    ) -> Tensor:
        y, squares = torch.ops.overlock_cpu.gelu_conv(*_pack(x, taps, bias))
        norm = squares.sum(1)[:, : x.shape[1], None, None].sqrt().to(x.dtype)
        scale = grn_scale(norm, gamma)
        if beta is not None:
            out_bias = torch.addmv(out_bias, weight.flatten(1), beta.flatten())
        y = y.permute(0, 3, 1, 2)
        ctx.save_for_backward(x, taps, bias, gamma, beta, weight, norm)
        if _scales_maps(x):
            return pointwise_conv2d(y.mul_(scale), weight, out_bias)
        scaled = weight * scale.view(len(x), 1, -1, 1, 1)
        out = [pointwise_conv2d(sample, kernels, out_bias) for sample, kernels in zip(y.split(1), scaled, strict=True)]
        return torch.cat(out) if len(out) > 1 else out[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.amp.custom_bwd(device_type='cpu')
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, taps, bias, gamma, beta, weight, norm = ctx.saved_tensors
        operands = _pack(x, taps, bias)
        y, _ = torch.ops.overlock_cpu.gelu_conv(*operands)
        slopes = pixels(grad, grad.dtype)
        matrix = weight.flatten(1)
        norms, gains = norm.double().flatten(1), gamma.double().flatten(1)
        scale, share, mean = _grn_parts(norms, gains)
        scale = scale.to(x.dtype)
        back = weight.transpose(0, 1)
        if _scales_maps(x):
            grad_z = pixels(pointwise_conv2d(slopes.permute(0, 3, 1, 2), back), x.dtype)
            grad_scale = (grad_z * y).sum((1, 2))
            grad_weight = slopes.flatten(0, 2).T @ y.mul_(scale[:, None, None]).flatten(0, 2)
            del y
        else:
            # Of the scaled weights of each sample, (B, C, D).
            grad_scaled = slopes.flatten(1, 2).mT @ y.flatten(1, 2)
            del y  # before there is another wide map
            grad_scale = (grad_scaled * matrix).sum(1)
            grad_weight = (grad_scaled * scale.unsqueeze(1)).sum(0)
            grad_z = pixels(pointwise_conv2d(slopes.permute(0, 3, 1, 2), back), x.dtype)
        grad_share = grad_scale * gains
        grad_norm = (grad_share - (grad_share * share).mean(1, keepdim=True)) / mean
        by_map = (grad_norm / norms).masked_fill_(norms == 0, 0).to(x.dtype)
        grad_x, sums = torch.ops.overlock_cpu.gelu_conv_backward(
            operands[0], grad_z, *operands[1:], pad_lanes(scale), pad_lanes(by_map)
        )
        grad_taps, grad_bias = sums.sum((0, 1))[:, : x.shape[1]].split((9, 1))
        grad_out_bias = slopes.sum((0, 1, 2))
        grad_beta = None
        if beta is not None:
            grad_weight.addr_(grad_out_bias, beta.flatten())
            grad_beta = (grad_out_bias @ matrix).view_as(beta)
        return (
            grad_x.permute(0, 3, 1, 2),
            grad_taps.T.reshape_as(taps),
            grad_bias[0],
            (grad_scale * share).sum(0).to(gamma.dtype).view_as(gamma),
            grad_beta,
            grad_weight.view_as(weight),
            grad_out_bias,
        )


def _scales_maps(x: Tensor) -> bool:
    """Return whether the scales of GRN multiply the map, instead of the weights."""
    return x.shape[2] * x.shape[3] < OWN_WEIGHTS_PIXELS


def _pack(x: Tensor, taps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return map, taps and bias as the C++ operators take them."""
    return pixels(x, x.dtype), pack_taps([taps], x.dtype), pad_lanes(bias)
