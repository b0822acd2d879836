"""ContMix on natten's neighborhood-attention kernel `na2d_av` (natten < 0.20). Only this file imports natten."""

import importlib.metadata
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from overlock.ops.contmix import eager
from overlock.ops.contmix.inputs import Inputs


@cache
def why_unavailable() -> str:
    """Return '' if natten has `na2d_av` and imports here, else the reason why not."""
    try:
        version = importlib.metadata.version('natten')
    except importlib.metadata.PackageNotFoundError:
        return 'natten is not installed; install natten==0.17.5'
    if tuple(int(part) for part in version.split('.')[:2]) >= (0, 20):
        return f'natten {version} has no na2d_av; install natten==0.17.5'
    try:
        _na2d_av()
    except Exception as error:  # natten runs code of its own at import, which fails in many ways
        return f'natten {version} does not import here ({type(error).__name__}: {error})'
    return ''


def run(inputs: Inputs) -> Tensor:
    """Return the mixed map, (B, C, H, W); natten differentiates its kernel itself."""
    outs = []
    for half in inputs.project().halves():
        weights = eager.compute_logits(half).softmax(2).permute(0, 1, 3, 4, 2)
        outs.append(aggregate_natten(weights, half.value, half.size).flatten(1, 2))
    return torch.cat(outs, 1)


def aggregate_natten(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Sum values under tap weights; see `overlock.ops.contmix.reference.mix`."""
    # natten ends the process on half types on CPUs.
    dtype = torch.promote_types(value.dtype, torch.float32) if value.device.type == 'cpu' else value.dtype
    weights, seen = (t.to(dtype).contiguous() for t in (weights, value.permute(0, 1, 3, 4, 2)))
    return _na2d_av()(weights, seen, kernel_size).permute(0, 1, 4, 2, 3).to(value.dtype)


@cache
def _na2d_av() -> Callable[[Tensor, Tensor, int], Tensor]:
    from unittest import mock  # takes a while to import

    # At import natten 0.17.5 takes a name that torch 2.11 has no more, and a function that raises without a GPU.
    capability = torch.cuda.get_device_capability if torch.cuda.is_available() else lambda device=None: (0, 0)
    with mock.patch.multiple(torch.cuda, create=True, _device_t=object, get_device_capability=capability):
        from natten.functional import na2d_av
    return na2d_av
