"""Operators."""

from overlock.ops.contmix import contmix, explain
from overlock.ops.depthwise import depthwise_conv2d

__all__ = ['contmix', 'depthwise_conv2d', 'explain']
