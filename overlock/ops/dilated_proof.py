"""Prove the operator of dilated branches on this machine by a call: against convolutions and BatchNorms in float64."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from overlock.ops import dilated, proof
from overlock.ops.proof import Claim, largest_deviation, probe

# Sizes and dilations.
BRANCHES = ((7, 1), (5, 1), (3, 1), (3, 2), (3, 3))
EPS = 1e-3

Branches = Sequence[tuple[int, int]]


def make_inputs(
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    channels: int = 20,
    size: tuple[int, int] = (11, 19),
    branches: Branches = BRANCHES,
) -> list[Tensor]:
    """Return a random map and parameters, which have at least float32; the first branch reaches as far as all others.

    The map has several tiles, borders, a block of channels that is not full, and means that are not zero.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(batch, channels, *size, generator=generator) + 0.5]
    tensors += [torch.randn(channels, 1, length, length, generator=generator) / length for length, _ in branches]
    tensors += [torch.randn(channels, generator=generator) + 1 for _ in range(2 * len(branches))]
    tensors = [tensor.to(device, torch.promote_types(dtype, torch.float32)) for tensor in tensors]
    return [tensors[0].to(dtype), *tensors[1:]]


def deviation(
    backend: str,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    branches: Branches = BRANCHES,
    **shape: Any,
) -> float:
    """Return the largest deviation of output, moments and gradients, each relative to its largest magnitude.

    Args:
        backend: 'eager' for the branches one by one; else the operator, with the backend that the device has.
        device: Where it runs; the reference runs on the CPU.
        dtype, branches, **shape: See `make_inputs`.
    """
    tensors = make_inputs(device, dtype, branches=branches, **shape)
    found = step(tensors, branches, backend != 'eager')
    return largest_deviation(found, step([tensor.double().cpu() for tensor in tensors], branches, False))


def step(tensors: list[Tensor], branches: Branches, fused: bool) -> list[Tensor]:
    """Return output, moments and gradients, of the operator or of the branches one by one."""
    x, *parameters = tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    narrow = x.dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(x.device.type, x.dtype, enabled=narrow):
        count = len(branches)
        weights, gains, shifts = (parameters[i : i + count] for i in range(0, 3 * count, count))
        if fused:
            y, (mean, variance, _) = dilated.dilated_norm(
                x, weights, [dilation for _, dilation in branches], gains, shifts, EPS
            )
        else:
            norms, means, variances = [], [], []
            for weight, (length, dilation), gain, shift in zip(weights, branches, gains, shifts, strict=True):
                z = F.conv2d(x, weight, None, 1, length // 2 * dilation, dilation, x.shape[1])
                means.append(torch.zeros_like(gain))
                variances.append(torch.ones_like(gain))
                # With a momentum of 1 the running statistics are those of the batch.
                norms.append(F.batch_norm(z, means[-1], variances[-1], gain, shift, True, 1.0, EPS))
            size = x.numel() // x.shape[1]
            y, mean, variance = (
                torch.stack(norms).sum(0),
                torch.stack(means),
                torch.stack(variances) * ((size - 1) / size),
            )
    return [y.detach(), mean, variance, *torch.autograd.grad(y, tensors, probe(y))]


def is_right(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the operator is right on a device for maps of a dtype; see `overlock.ops.proof.is_right`."""
    claim = Claim('dilated', backend, device, dtype, True)
    return proof.is_right(claim, lambda name: deviation(name, device, dtype))
