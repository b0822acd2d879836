"""Stochastic depth."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops the whole branch of a sample with probability `rate` while training (Huang et al., 2016)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        # A tensor: out of a number torch.compile would make one graph for each block, as the rates all differ.
        self.register_buffer('keep', torch.empty(()), persistent=False)
        self.rate = rate

    @property
    def rate(self) -> float:
        """The probability."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate, self.drops = rate, rate > 0
        self.keep.fill_(1 - rate)

    def _apply(self, fn: Callable, recurse: bool = True) -> 'DropPath':
        super()._apply(fn, recurse)
        # What was on the meta device has no value yet.
        self.keep.fill_(1 - self._rate)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same; survivors are scaled by 1 / (1 - rate)."""
        if not self.training or not self.drops:
            return x
        keep = self.keep.to(x.dtype).expand((x.shape[0],) + (1,) * (x.ndim - 1))
        return x * (torch.bernoulli(keep) / keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'
