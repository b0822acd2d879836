"""Prove a backend of ContMix on this machine by a call: output and gradients against `reference` in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from overlock.ops.contmix.dispatch import contmix

# Largest deviations, relative to the largest magnitude of the output and of each gradient.
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def make_inputs(
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 2,
    groups: int = 2,
    depth: int = 16,
    kernel_sizes: tuple[int, int] = (5, 7),
    size: tuple[int, int] = (9, 14),
    regions: int = 7,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Return random tensors and the other arguments of `contmix`; `depth` is d, the channels of a group of the query.

    Query, key and value have the dtype, the parameters float32.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        return x.to(device, dtype if len(shape) == 4 else torch.float32)

    half, taps = groups * depth, sum(kernel**2 for kernel in kernel_sizes)
    tensors = [
        draw(batch, half, *size),
        draw(batch, half, regions, regions),
        draw(batch, 2 * half, *size),
        draw(taps, regions**2) / regions,
        draw(taps),
        *(draw(groups, 2 * kernel - 1, 2 * kernel - 1) for kernel in kernel_sizes),
    ]
    return tensors, dict(kernel_sizes=kernel_sizes, num_groups=groups, scale=depth**-0.5)


def deviation(backend: str, device: str | torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Return the largest deviation of a backend's output and gradients, each relative to its largest magnitude.

    The small call takes every kind of pixel: inside, at borders, in corners, and where a block of threads ends.

    Raises:
        RuntimeError: The backend cannot run here, or not on this device and dtype.
    """
    tensors, options = make_inputs(device, dtype)
    found = _run(backend, tensors, options)
    exact = _run('reference', [tensor.double().cpu() for tensor in tensors], options)
    deviations = [(a.double().cpu() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
    # torch's maximum of a NaN is NaN, which is below no limit.
    return float(torch.stack(deviations).max())


def _run(backend: str, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    narrow = tensors[0].dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(tensors[0].device.type, tensors[0].dtype, enabled=narrow):
        out = contmix(*tensors, **options, backend=backend)
    # Neither a sum nor a mean, whose gradients are the same at each pixel.
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out))]
