"""The network, in reading order: arch, blocks, overlock (three nets and the classifier), backbone, forms, names."""

from overlock.models.arch import ARCHS, Arch, get_arch
from overlock.models.backbone import OverLoCKBackbone
from overlock.models.contmix_block import ContMixBlock
from overlock.models.moganet import MOGANET_ARCHS, MogaArch, MogaNet, MogaNetBackbone
from overlock.models.overlock import OverLoCK

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
    'get_arch',
]
