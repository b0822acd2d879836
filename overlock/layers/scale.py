"""Scaling of maps: learned for each channel, by squeeze-and-excitation, at random for each sample."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from overlock.layers.conv import PointwiseConv


class ChannelAffine(nn.Module):
    """`weight * x + bias` for each channel, plus another map if one is given.

    Every weight starts at `init_value`, every bias at 0. The bias is None once it is folded into the added map.
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

    @torch.no_grad()
    def move_bias_to(self, source: 'nn.Conv2d | ChannelAffine') -> None:
        """Move the bias into the module whose output is the added map."""
        assert source.bias is not None
        bias = (source.bias.double() + self.bias.double()).to(source.bias.dtype)
        source.bias = nn.Parameter(bias, source.bias.requires_grad)
        self.register_parameter('bias', None)


class SqueezeExcite(nn.Module):
    """Scale each channel by a sigmoid of the globally pooled map (Hu et al., 2018), GELU inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 8, 16)
        self.fc1 = PointwiseConv(channels, hidden)
        self.act = nn.GELU()
        self.fc2 = PointwiseConv(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        scale = self.fc2(self.act(self.fc1(x.mean(dim=(2, 3), keepdim=True))))
        return x * scale.sigmoid()


class DropPath(nn.Module):
    """Drop the whole branch of a sample with probability `rate` while training (Huang et al., 2016)."""

    keep: Tensor

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.rate, self.drops = rate, rate > 0
        # A tensor: from numbers, which all differ, torch.compile would make one graph for each block.
        self.register_buffer('keep', torch.tensor(1.0 - rate), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'DropPath':
        super()._apply(fn, recurse)
        # A tensor from the meta device has no value yet.
        self.keep.fill_(1 - self.rate)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, ...) to the same shape; scale the samples that stay by 1 / (1 - rate)."""
        if not self.training or not self.drops:
            return x
        keep = self.keep.to(x.dtype).expand((x.shape[0],) + (1,) * (x.ndim - 1))
        return x * (torch.bernoulli(keep) / keep)

    def extra_repr(self) -> str:
        return f'rate={self.rate:.3f}'
