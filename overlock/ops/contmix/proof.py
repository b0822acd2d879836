"""Prove a backend of ContMix on this machine by a call: output and gradients against `reference` in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from overlock.ops import proof
from overlock.ops.contmix.dispatch import contmix
from overlock.ops.proof import Claim, largest_deviation, probe


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

    Query, key and value have the dtype, the parameters at least float32.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator)
        return x.to(device, dtype if len(shape) == 4 else torch.promote_types(dtype, torch.float32))

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


def deviation(
    backend: str, device: str | torch.device, dtype: torch.dtype = torch.float32, *, backward: bool = True, **shape: Any
) -> float:
    """Return the largest deviation of a backend's output and gradients, each relative to its largest magnitude.

    The small call takes every kind of pixel: inside, at borders, in corners, and where a block of threads ends.

    Args:
        backend: Its name.
        device: Where it runs; the reference runs on the CPU.
        dtype: Of query, key and value.
        backward: Whether to compare the gradients too.
        **shape: See `make_inputs`.

    Raises:
        RuntimeError: The backend cannot run here, or not on this device and dtype.
    """
    tensors, options = make_inputs(device, dtype, **shape)
    found = _run(backend, tensors, options, backward)
    exact = _run('reference', [tensor.double().cpu() for tensor in tensors], options, backward)
    return largest_deviation(found, exact)


def _run(backend: str, tensors: list[Tensor], options: dict[str, Any], backward: bool) -> list[Tensor]:
    tensors = [tensor.detach().requires_grad_(backward) for tensor in tensors]
    narrow = tensors[0].dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(tensors[0].device.type, tensors[0].dtype, enabled=narrow):
        out = contmix(*tensors, **options, backend=backend)
    if not backward:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, tensors, probe(out))]


def is_right(backend: str, device: torch.device, dtype: torch.dtype, backward: bool, **shape: Any) -> bool:
    """Return whether a backend is right; see `overlock.ops.proof.is_right`.

    Args:
        backend, device, dtype, backward, **shape: See `deviation`.
    """
    claim = Claim('ContMix', backend, device, dtype, backward)
    return proof.is_right(claim, lambda name: deviation(name, device, dtype, backward=backward, **shape))
