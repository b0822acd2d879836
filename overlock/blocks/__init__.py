"""The two blocks of OverLoCK."""

from overlock.blocks.dynamic import DynamicBlock
from overlock.blocks.static import StaticBlock

__all__ = ['DynamicBlock', 'StaticBlock']
