"""ContMix, the context-mixing dynamic convolution: one function, several backends."""

from overlock.ops.contmix.dispatch import BACKENDS, contmix, explain

__all__ = ['BACKENDS', 'contmix', 'explain']
