"""OverLoCK: an overview-first-look-closely-next ConvNet with context-mixing dynamic kernels (CVPR 2025)."""

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
