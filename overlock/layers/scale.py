"""Scaling of maps: learned for each channel, by squeeze-and-excitation, at random for each sample."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from overlock.layers.fold import fold_affine_into_previous


class ChannelAffine(nn.Module):
    """`weight * x + bias` for each channel, plus another map if one is given.

    Args:
        channels: Channels of the map.
        init_value: Initial value of every weight; biases start at 0.

    Attributes:
        bias: (channels,), or None once it is folded into the added map.
    """

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        # The shape of a depthwise 1x1 convolution, so that published tensors fit as they are.
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init_value))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Scale and shift a map (B, C, H, W) and add another of this shape, in the dtype of `x`."""
        weight = self.weight.view(1, -1, 1, 1).to(x.dtype)
        if self.bias is None:
            return torch.addcmul(addend, x, weight)
        y = torch.addcmul(self.bias.view(1, -1, 1, 1).to(x.dtype), x, weight)
        return y if addend is None else y + addend

    def fold_bias_into(self, conv: nn.Conv2d) -> None:
        """Move the bias into the convolution whose output is the addend."""
        fold_affine_into_previous(conv, 1.0, self.bias)
        self.register_parameter('bias', None)

    @torch.no_grad()
    def move_bias_to(self, other: 'ChannelAffine') -> None:
        """Move the bias into the affine whose output is the addend."""
        bias = (other.bias.double() + self.bias.double()).to(other.bias.dtype)
        other.bias = nn.Parameter(bias, other.bias.requires_grad)
        self.register_parameter('bias', None)

    def fold_into(self, conv: nn.Conv2d) -> None:
        """Fold this affine into the convolution whose output it takes."""
        fold_affine_into_previous(conv, self.weight.flatten(), self.bias)


class Shortcut(nn.Module):
    """An unscaled shortcut, in the place of a `ChannelAffine`."""

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Add two maps (B, C, H, W)."""
        return x if addend is None else x + addend


class SqueezeExcite(nn.Module):
    """Scale each channel by a sigmoid of the globally pooled map (Hu et al., 2018), GELU inside.

    Args:
        channels: Channels of the map.
        reduction: The hidden width is `channels // reduction`, at least 16.
    """

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        hidden = max(channels // reduction, 16)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        scale = self.fc2(self.act(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * scale.sigmoid()


class DropPath(nn.Module):
    """Drop the whole branch of a sample with probability `rate` while training (Huang et al., 2016)."""

    keep: Tensor

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        # A tensor: from numbers, which all differ, torch.compile would make one graph for each block.
        self.register_buffer('keep', torch.empty(()), persistent=False)
        self.rate = rate

    @property
    def rate(self) -> float:
        """Return the probability of dropping a sample."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        self._rate, self.drops = rate, rate > 0
        self.keep.fill_(1 - rate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'DropPath':
        super()._apply(fn, recurse)
        # A tensor from the meta device has no value yet.
        self.keep.fill_(1 - self._rate)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to the same shape; scale the samples that stay by 1 / (1 - rate)."""
        if not self.training or not self.drops:
            return x
        keep = self.keep.to(x.dtype).expand((x.shape[0],) + (1,) * (x.ndim - 1))
        return x * (torch.bernoulli(keep) / keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'
