"""Operators."""

from overlock.ops.contmix import contmix, explain

__all__ = ['contmix', 'explain']
