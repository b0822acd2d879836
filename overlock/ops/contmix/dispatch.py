"""Which backend of ContMix runs, and why another cannot."""

import logging
from functools import cache

import torch
from torch import Tensor

from overlock.ops.context import is_exporting
from overlock.ops.contmix import compiled, eager, library, natten, reference, triton

BACKENDS = {'reference': reference, 'eager': eager, 'compiled': compiled, 'triton': triton, 'natten': natten}
OPERATORS = {name: library.register(name, BACKENDS[name]) for name in ('eager', 'compiled', 'triton')}

_logger = logging.getLogger(__name__)


def explain() -> dict[str, str]:
    """For each backend 'available', or why it cannot run here."""
    return {name: _why_not(name) or 'available' for name in BACKENDS}


def _why_not(backend: str) -> str:
    runs, reason = BACKENDS[backend].verify()
    return '' if runs else reason


def check_backend(backend: str) -> None:
    """Checks that a backend, or 'auto', can run here.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the backend cannot run here, with the reason.
    """
    if backend == 'auto':
        return
    if backend not in BACKENDS:
        raise ValueError(f"contmix backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = _why_not(backend)
    if reason:
        raise RuntimeError(f'contmix backend {backend!r} was asked for but cannot run here: {reason}')


def choose(value: Tensor, kernel_sizes: tuple[int, int]) -> str:
    """What 'auto' stands for: the fused backend of the device, `eager` where it cannot run.

    On 2 AVX-512 cores `compiled` is 5 to 36 times faster than `eager`, in forward and in training, at each of the
    shapes of XT and S measured (benchmarks/results/operator-*.json).
    """
    fused = {'cpu': 'compiled', 'cuda': 'triton'}.get(value.device.type)
    # Triton's float64 is for tests: its kernels spill registers.
    if fused is None or _misfit(fused, value, kernel_sizes) or (fused == 'triton' and value.dtype == torch.float64):
        return 'eager'
    reason = _why_not(fused)
    if reason:
        _log_once(f'ContMix falls back to the eager backend: {fused}: {reason}')
        return 'eager'
    return fused


def _misfit(backend: str, value: Tensor, kernel_sizes: tuple[int, int]) -> str:
    """Why a backend that runs here cannot take these inputs, or ''."""
    device = value.device.type
    if backend == 'compiled' and device != 'cpu':
        return f'it runs on the CPU and the maps are on {device}'
    if backend == 'compiled' and not set(kernel_sizes) <= set(compiled.KERNEL_SIZES):
        return f'it has kernels of {", ".join(map(str, compiled.KERNEL_SIZES))} and kernel_sizes are {kernel_sizes}'
    if backend == 'triton' and device != 'cuda' and not triton.interpreted():
        return f'it runs on CUDA devices and the maps are on {device}'
    return ''


@cache
def _log_once(message: str) -> None:
    _logger.info(message)


# torch.compile cannot follow these into files and logs, and takes what they return for constant. This is what
# torch.compiler.assume_constant_result does; calling it here would import torch._dynamo, and with it triton.
_why_not._dynamo_marked_constant = _log_once._dynamo_marked_constant = True


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
    """Convolves each pixel with kernels computed from its affinity to S x S regions (paper, Sec. 3.3, ContMix).

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
        backend: 'auto', 'reference', 'eager', 'compiled', 'triton' or 'natten'.

    Returns:
        (B, C, H, W), in the dtype of `value`.

    Raises:
        ValueError: If the map is smaller than the large kernel or shapes do not fit.
        RuntimeError: If the backend asked for cannot run here, or not on these inputs.
    """
    _check_shapes(query, key, value, weight, rpb_small, rpb_large, kernel_sizes, num_groups)
    check_backend(backend)
    misfit = _misfit(backend, value, kernel_sizes)
    if misfit:
        raise RuntimeError(f'contmix backend {backend!r} was asked for but cannot take these inputs: {misfit}')
    if backend == 'reference':
        return reference.contmix(query, key, value, weight, bias, rpb_small, rpb_large, kernel_sizes, num_groups, scale)
    # Affinities and their projection are linear, so the regions are projected and not the affinities of every pixel.
    kernel = (scale * key).flatten(2).unflatten(1, (num_groups, -1)) @ weight.t()
    inputs = query.to(value.dtype), kernel.to(value.dtype), value, bias, rpb_small, rpb_large
    if backend == 'natten':
        return natten.plain(*inputs)
    if backend in ('auto', 'eager') and is_exporting():  # elsewhere our operators are unknown
        return eager.plain(*inputs)
    return OPERATORS[choose(value, kernel_sizes) if backend == 'auto' else backend](*inputs)


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    rpb_small: Tensor,
    rpb_large: Tensor,
    kernel_sizes: tuple[int, int],
    num_groups: int,
) -> None:
    height, width = value.shape[2:]
    small, large = kernel_sizes
    if small % 2 == 0 or large % 2 == 0:
        raise ValueError(f'kernel_sizes must be odd, got {kernel_sizes}')
    if min(height, width) < max(kernel_sizes):
        raise ValueError(f'value must be at least {max(kernel_sizes)} pixels high and wide, got {height}x{width}')
    if value.shape[1] != 2 * query.shape[1] or value.shape[1] % (2 * num_groups):
        raise ValueError(
            f'value must have twice the channels of query and a multiple of 2 x {num_groups} groups, '
            f'got {value.shape[1]} and {query.shape[1]}'
        )
    if weight.shape[0] != small**2 + large**2 or weight.shape[1] != key.shape[2:].numel():
        raise ValueError(
            f'weight must have shape ({small**2 + large**2}, {key.shape[2:].numel()}), got {tuple(weight.shape)}'
        )
    for size, rpb in ((small, rpb_small), (large, rpb_large)):
        if rpb.shape != (num_groups, 2 * size - 1, 2 * size - 1):
            raise ValueError(f'rpb must have shape {(num_groups, 2 * size - 1, 2 * size - 1)}, got {tuple(rpb.shape)}')
