"""ContMix on natten's neighbourhood-attention kernel (`na2d_av`, natten < 0.20). The one file that imports natten."""

import importlib.metadata
import importlib.util
from functools import lru_cache

from torch import Tensor

from overlock.ops.contmix import eager


@lru_cache(maxsize=1)
def verify() -> tuple[bool, str]:
    """Whether natten has `na2d_av` and imports here, and if not, why not."""
    if importlib.util.find_spec('natten') is None:
        return False, 'natten is not installed; install natten==0.17.5'
    version = importlib.metadata.version('natten')
    if tuple(int(part) for part in version.split('.')[:2]) >= (0, 20):
        return False, f'natten {version} has no na2d_av; install natten==0.17.5'
    try:
        _na2d_av()
    except Exception as error:  # natten runs code of its own at import and fails there in many ways
        return False, f'natten {version} does not import here ({type(error).__name__}: {error})'
    return True, ''


def _na2d_av():
    from natten.functional import na2d_av
    return na2d_av


def contmix(*args, **kwargs) -> Tensor:
    """See `overlock.ops.contmix`."""
    return eager.contmix(*args, **kwargs, aggregation=_aggregate)


def _aggregate(weights: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Weights (B, G, K^2, H, W) and value (B, G, d, H, W) to (B, G, d, H, W)."""
    weights = weights.to(value.dtype).permute(0, 1, 3, 4, 2).contiguous()
    value = value.permute(0, 1, 3, 4, 2).contiguous()
    return _na2d_av()(weights, value, kernel_size).permute(0, 1, 4, 2, 3)
