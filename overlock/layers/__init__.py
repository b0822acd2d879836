"""The small layers that blocks are made of."""

from overlock.layers.conv import ConvNorm, PointwiseConv, ResidualDWConv
from overlock.layers.ffn import ConvFFN
from overlock.layers.large_kernel import DilatedReparamConv
from overlock.layers.norm import GRN, LayerNorm2d
from overlock.layers.scale import ChannelAffine, DropPath, SqueezeExcite

__all__ = [
    'ChannelAffine',
    'ConvFFN',
    'ConvNorm',
    'DilatedReparamConv',
    'DropPath',
    'GRN',
    'LayerNorm2d',
    'PointwiseConv',
    'ResidualDWConv',
    'SqueezeExcite',
]
