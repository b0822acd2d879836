"""Which backend of ContMix runs, and why another cannot."""

from collections.abc import Callable

from torch import Tensor

from overlock.ops.contmix import eager, natten, reference

BACKENDS = {'reference': reference, 'eager': eager, 'natten': natten}


def explain() -> dict[str, str]:
    """For each backend 'available', or why it cannot run here."""
    return {name: 'available' if module.verify()[0] else module.verify()[1] for name, module in BACKENDS.items()}


def resolve(backend: str) -> Callable[..., Tensor]:
    """The function of a backend by name.

    Raises:
        ValueError: If the name is unknown.
        RuntimeError: If the backend cannot run here, with the reason.
    """
    if backend == 'auto':
        return eager.contmix
    if backend not in BACKENDS:
        raise ValueError(f"contmix backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    runs, reason = BACKENDS[backend].verify()
    if not runs:
        raise RuntimeError(f"contmix backend {backend!r} was asked for but cannot run here: {reason}")
    return BACKENDS[backend].contmix


def contmix(query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor, rpb_small: Tensor,
            rpb_large: Tensor, *, kernel_sizes: tuple[int, int], num_groups: int, scale: float,
            backend: str = 'auto') -> Tensor:
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
        backend: 'auto', 'reference', 'eager' or 'natten'.

    Returns:
        (B, C, H, W), in the dtype of `value`.

    Raises:
        ValueError: If the map is smaller than the large kernel or shapes do not fit.
        RuntimeError: If the backend asked for cannot run here.
    """
    height, width = value.shape[2:]
    small, large = kernel_sizes
    if small % 2 == 0 or large % 2 == 0:
        raise ValueError(f'kernel_sizes must be odd, got {kernel_sizes}')
    if min(height, width) < max(kernel_sizes):
        raise ValueError(f'value must be at least {max(kernel_sizes)} pixels high and wide, got {height}x{width}')
    if value.shape[1] != 2 * query.shape[1] or value.shape[1] % (2 * num_groups):
        raise ValueError(f'value must have twice the channels of query and a multiple of 2 x {num_groups} groups, '
                         f'got {value.shape[1]} and {query.shape[1]}')
    if weight.shape[0] != small ** 2 + large ** 2 or weight.shape[1] != key.shape[2:].numel():
        raise ValueError(f'weight must have shape ({small ** 2 + large ** 2}, {key.shape[2:].numel()}), '
                         f'got {tuple(weight.shape)}')
    return resolve(backend)(query, key, value, weight, bias, rpb_small, rpb_large, kernel_sizes, num_groups, scale)
