"""The choice of the backend that runs ContMix."""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from overlock.ops.contmix import cpp, eager, natten, reference, triton
from overlock.ops.contmix.inputs import Inputs
from overlock.ops.tracing import is_exporting, is_free

# Each has `run`, from the inputs to the mixed map. `why_unavailable` returns '' or why a backend cannot run on this
# machine, but for `reference` and `eager`, which run everywhere.
BACKENDS = {'reference': reference, 'eager': eager, 'cpp': cpp, 'triton': triton, 'natten': natten}
# What 'auto' takes on each type of device. `why_unsupported` of these returns '' or why they cannot take some inputs.
FUSED = {'cpu': 'cpp', 'cuda': 'triton'}
# Names of earlier versions.
ALIASES = {'compiled': 'cpp'}

_logger = logging.getLogger(__name__)


def explain() -> dict[str, str]:
    """Return for each backend 'available', or the reason why it cannot run here."""
    return {name: _why_not(name) or 'available' for name in BACKENDS}


def check_backend(backend: str) -> None:
    """Check that a backend, or 'auto', can run here.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the backend cannot run here, with the reason.
    """
    name = ALIASES.get(backend, backend)
    if name == 'auto':
        return
    if name not in BACKENDS:
        raise ValueError(f"contmix backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    if reason := _why_not(name):
        raise RuntimeError(f'contmix backend {backend!r} was asked for but cannot run here: {reason}')


def choose(inputs: Inputs) -> str:
    """Return the backend that 'auto' stands for: the fast one for these inputs, or `eager` where it cannot run."""
    name = FUSED.get(inputs.value.device.type, 'eager')
    # An exported graph must not contain operators of ours, which are unknown elsewhere.
    if is_exporting() or _why_unsupported(name, inputs):
        return 'eager'
    # Triton's kernels in float64 are for tests: they spill registers.
    if name == 'triton' and inputs.value.dtype == torch.float64:
        return 'eager'
    if reason := _why_not(name):
        _log_once(f'ContMix falls back to the eager backend: {name}: {reason}')
        return 'eager'
    return name


def _why_not(name: str) -> str:
    return '' if name in ('reference', 'eager') else BACKENDS[name].why_unavailable()


def _why_unsupported(name: str, inputs: Inputs) -> str:
    return BACKENDS[name].why_unsupported(inputs) if name in FUSED.values() else ''


@cache
def _log_once(message: str) -> None:
    _logger.info(message)


def _is_right(name: str, device: torch.device, dtype: torch.dtype, backward: bool, shape: dict[str, Any]) -> bool:
    # It is built on `contmix`.
    from overlock.ops.contmix.proof import is_right

    return is_right(name, device, dtype, backward, **shape)


def _proved(name: str, inputs: Inputs) -> str:
    """Return the name of a backend if it is right here, else 'eager'."""
    if name == 'eager':
        return name
    backward = torch.is_grad_enabled() and any([tensor.requires_grad for tensor in inputs[:7]])
    shape: dict[str, Any] = {}
    if not torch.compiler.is_compiling():
        # Triton compiles for each of these: the proof takes the kernels that are needed anyway.
        depth, rows = inputs.query.shape[1] // inputs.num_groups, max(inputs.kernel_sizes) + 1
        shape = dict(batch=1, depth=depth, kernel_sizes=inputs.kernel_sizes, size=(rows, max(rows, 18)))
    return name if _is_right(name, inputs.value.device, inputs.value.dtype, backward, shape) else 'eager'


# torch.compile cannot trace file access, logging and threads, and treats the results of these as constants. This is
# what torch.compiler.assume_constant_result does; a call of it would import torch._dynamo, and with it triton.
_untraced: list[Any] = [_why_not, _log_once, _is_right]
for _function in _untraced:
    _function._dynamo_marked_constant = True


def contmix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb_small: Tensor,
    rpb_large: Tensor,
    *,
    kernel_sizes: tuple[int, int],
    num_groups: int,
    scale: float,
    backend: str = 'auto',
) -> Tensor:
    """Convolve each pixel with kernels computed from its affinity to S x S regions (paper, Sec. 3.3, ContMix).

    The first half of the value channels meets the small kernels, the second half the large ones. A window near a
    border moves inward and stays whole.

    Args:
        query: (B, C / 2, H, W), G groups of d channels each, d = C / 2G. Any float dtype, as all that follow.
        key: (B, C / 2, S, S), the regions.
        value: (B, C, H, W), H and W at least the large kernel.
        weight: (k^2 + K^2, S^2), from affinities to the taps of the small and the large kernel.
        bias: (k^2 + K^2,), added to every group's taps.
        rpb_small: (G, 2k - 1, 2k - 1), relative position bias by key - query + k - 1.
        rpb_large: (G, 2K - 1, 2K - 1), the same for the large kernel.
        kernel_sizes: (k, K), odd.
        num_groups: G.
        scale: Factor on the affinities.
        backend: 'auto', 'reference', 'eager', 'cpp', 'triton' or 'natten'. 'auto' takes a fused backend only where a
            small call of it, once a process, device and dtype, agrees with the reference.

    Returns:
        (B, C, H, W), in the dtype of `value`.

    Raises:
        ValueError: If the map is smaller than the large kernel, shapes do not fit, or the backend is unknown.
        RuntimeError: If the backend asked for cannot run here, or not on these inputs.
    """
    inputs = Inputs(query, key, value, weight, bias, rpb_small, rpb_large, kernel_sizes, num_groups, scale)
    # Of a length that is not known there is nothing to check.
    if not is_free(*value.shape[2:]):
        inputs.check_shapes()
    check_backend(backend)
    name = _proved(choose(inputs), inputs) if backend == 'auto' else ALIASES.get(backend, backend)
    if reason := _why_unsupported(name, inputs):
        raise RuntimeError(f'contmix backend {backend!r} was asked for but cannot take these inputs: {reason}')
    return BACKENDS[name].run(inputs)
