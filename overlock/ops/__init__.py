"""Operators."""

from overlock.ops.contmix import contmix, explain
from overlock.ops.depthwise import depthwise_conv2d
from overlock.ops.norm import spatial_norm

__all__ = ['contmix', 'depthwise_conv2d', 'explain', 'spatial_norm']
