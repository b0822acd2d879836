"""Stochastic depth."""

from torch import Tensor, nn


class DropPath(nn.Module):
    """Drops the whole branch of a sample with probability `rate` while training (Huang et al., 2016)."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same; survivors are scaled by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'
