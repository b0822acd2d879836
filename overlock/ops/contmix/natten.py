"""ContMix on natten's neighborhood-attention kernel `na2d_av` (natten < 0.20). Only this file imports natten."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from overlock.ops.contmix import eager
from overlock.ops.contmix.inputs import Inputs


@cache
def why_unavailable() -> str:
    """Return '' if natten has `na2d_av` and imports here, else the reason why not."""
    if importlib.util.find_spec('natten') is None:
        return 'natten is not installed; install natten==0.17.5'
    try:
        version = importlib.metadata.version('natten')
    except importlib.metadata.PackageNotFoundError:
        return 'what imports as natten is not an installed package; install natten==0.17.5'
    if tuple(int(part) for part in version.split('.')[:2]) >= (0, 20):
        return f'natten {version} has no na2d_av; install natten==0.17.5'
    try:
        _na2d_av()
    except Exception as error:  # natten runs code of its own at import, which fails in many ways
        return f'natten {version} does not import here ({type(error).__name__}: {error})'
    return ''


def why_unsupported(inputs: Inputs) -> str:
    """Return '': natten takes all inputs."""
    return ''


def run(inputs: Inputs) -> Tensor:
    """Return the mixed map, (B, C, H, W); natten differentiates its kernel itself."""
    x = inputs.project()
    # natten ends the process on half types on CPUs.
    dtype = torch.promote_types(x.value.dtype, torch.float32) if x.value.device.type == 'cpu' else x.value.dtype
    outs = []
    for half in x.halves():
        weights = eager.compute_logits(x.query, half).softmax(2)
        weights, value = (t.permute(0, 1, 3, 4, 2).to(dtype).contiguous() for t in (weights, half.value))
        outs.append(_na2d_av()(weights, value, half.size).permute(0, 1, 4, 2, 3).flatten(1, 2))
    return torch.cat(outs, 1).to(x.value.dtype)


@cache
def _na2d_av() -> Callable[[Tensor, Tensor, int], Tensor]:
    with _names_of_older_torch():
        from natten.functional import na2d_av
    return cast(Callable[[Tensor, Tensor, int], Tensor], na2d_av)


@contextmanager
def _names_of_older_torch() -> Iterator[None]:
    """Supply the two names of torch.cuda that natten 0.17.5 uses at import.

    torch 2.11 has no `_device_t`, and `get_device_capability` raises where there is no GPU.
    """
    stand_ins: dict[str, Any] = {} if hasattr(torch.cuda, '_device_t') else {'_device_t': object}
    if not torch.cuda.is_available():
        stand_ins['get_device_capability'] = lambda device=None: (0, 0)
    missing = object()
    kept = {name: getattr(torch.cuda, name, missing) for name in stand_ins}
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    try:
        yield
    finally:
        for name, value in kept.items():
            delattr(torch.cuda, name) if value is missing else setattr(torch.cuda, name, value)
