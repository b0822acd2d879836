"""ContMix on natten's neighbourhood-attention kernel (`na2d_av`, natten < 0.20). The one file that imports natten."""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from overlock.ops.contmix import eager


@cache
def verify() -> tuple[bool, str]:
    """Whether natten has `na2d_av` and imports here, and if not, why not."""
    if importlib.util.find_spec('natten') is None:
        return False, 'natten is not installed; install natten==0.17.5'
    try:
        version = importlib.metadata.version('natten')
    except importlib.metadata.PackageNotFoundError:
        return False, 'what imports as natten is no installed package; install natten==0.17.5'
    if tuple(int(part) for part in version.split('.')[:2]) >= (0, 20):
        return False, f'natten {version} has no na2d_av; install natten==0.17.5'
    try:
        _na2d_av()
    except Exception as error:  # natten runs code of its own at import and fails there in many ways
        return False, f'natten {version} does not import here ({type(error).__name__}: {error})'
    return True, ''


@cache
def _na2d_av() -> Callable[[Tensor, Tensor, int], Tensor]:
    with _names_of_older_torch():
        from natten.functional import na2d_av
    return na2d_av


@contextmanager
def _names_of_older_torch() -> Iterator[None]:
    """Supplies what natten 0.17.5 takes from torch.cuda while it is imported: torch 2.11 dropped the first name, and
    without a GPU the second raises."""
    stand_ins = {} if hasattr(torch.cuda, '_device_t') else {'_device_t': object}
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


def plain(query: Tensor, kernel: Tensor, value: Tensor, bias: Tensor, rpb_small: Tensor, rpb_large: Tensor) -> Tensor:
    """See `overlock.ops.contmix.library.register`; natten has gradients of its own."""
    # natten ends the process over half types on CPUs.
    dtype = torch.promote_types(value.dtype, torch.float32) if value.device.type == 'cpu' else value.dtype
    outs = []
    for taps, tap_bias, rpb, half, _ in eager.halves(kernel, bias, rpb_small, rpb_large, value, value):
        weights = eager.compute_logits(query, taps, tap_bias, rpb, half.shape[3:]).softmax(2)
        weights, half = (t.permute(0, 1, 3, 4, 2).to(dtype).contiguous() for t in (weights, half))
        outs.append(_na2d_av()(weights, half, round(taps.shape[3] ** 0.5)).permute(0, 1, 4, 2, 3).flatten(1, 2))
    return torch.cat(outs, 1).to(value.dtype)
