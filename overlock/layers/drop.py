"""Stochastic depth."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops the whole branch of a sample with probability `rate` while training (Huang et al., 2016)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate
        self.drops = rate > 0
        # A tensor: out of a number torch.compile would make one graph for each block, as the rates all differ.
        self.register_buffer('keep', torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same; survivors are scaled by 1 / (1 - rate)."""
        if not self.training or not self.drops:
            return x
        keep = self.keep.to(x.dtype).expand((x.shape[0],) + (1,) * (x.ndim - 1))
        return x * (torch.bernoulli(keep) / keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'
