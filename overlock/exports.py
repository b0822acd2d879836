"""What `import overlock` offers."""

import overlock.checkpoint as checkpoint
from overlock.cli.predict import predict
from overlock.models.arch import ARCHS, Arch, get_arch
from overlock.models.backbone import OverLoCKBackbone
from overlock.models.contmix_block import ContMixBlock
from overlock.models.moganet import MOGANET_ARCHS, MogaArch, MogaNet, MogaNetBackbone
from overlock.models.overlock import OverLoCK
from overlock.ops import contmix
from overlock.utils.memory import keep_freed_memory

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
    'predict',
]
