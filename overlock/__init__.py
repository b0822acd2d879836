"""OverLoCK: an overview-first-look-closely-next ConvNet with context-mixing dynamic kernels (CVPR 2025)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overlock import checkpoint
    from overlock.models import (
        ARCHS,
        MOGANET_ARCHS,
        Arch,
        ContMixBlock,
        MogaArch,
        MogaNet,
        MogaNetBackbone,
        OverLoCK,
        OverLoCKBackbone,
        get_arch,
    )
    from overlock.ops import contmix
    from overlock.utils.memory import keep_freed_memory

__version__ = '0.1.0'
__all__ = [
    'ARCHS',
    'MOGANET_ARCHS',
    'Arch',
    'ContMixBlock',
    'MogaArch',
    'MogaNet',
    'MogaNetBackbone',
    'OverLoCK',
    'OverLoCKBackbone',
    'checkpoint',
    'contmix',
    'get_arch',
    'keep_freed_memory',
]

_FOLDERS = ('checkpoint', 'layers', 'models', 'ops', 'utils')
# Where the other names are that `overlock.models` does not have.
_ELSEWHERE = {'contmix': 'overlock.ops', 'keep_freed_memory': 'overlock.utils.memory'}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: the command line answers without torch."""
    if name in _FOLDERS:
        return import_module(f'overlock.{name}')
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_ELSEWHERE.get(name, 'overlock.models')), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_FOLDERS})
