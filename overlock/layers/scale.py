"""A learned multiply-add for each channel: layer scale, and the weights that mix contexts."""

import torch
from torch import Tensor, nn

from overlock.reparam import fold_affine_into_previous


class ChannelAffine(nn.Module):
    """`weight * x + bias` for each channel, plus another map where there is one to add.

    Args:
        channels: Channels of the map.
        init_value: What every weight starts from; biases start from 0.

    Attributes:
        bias: (channels,), or None once it is part of what is added.
    """

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        # The shape of a depthwise 1x1 convolution, so that published tensors fit as they are.
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init_value))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """(B, C, H, W), and as much to add, to the same in the dtype of `x`."""
        weight = self.weight.view(1, -1, 1, 1).to(x.dtype)
        if self.bias is None:
            return torch.addcmul(addend, x, weight)
        y = torch.addcmul(self.bias.view(1, -1, 1, 1).to(x.dtype), x, weight)
        return y if addend is None else y + addend

    def fold_bias_into(self, conv: nn.Conv2d) -> None:
        """Moves the bias into the convolution whose output is the addend."""
        fold_affine_into_previous(conv, 1.0, self.bias)
        self.bias = None

    @torch.no_grad()
    def move_bias_to(self, other: 'ChannelAffine') -> None:
        """Moves the bias into the affine whose output is the addend."""
        bias = (other.bias.double() + self.bias.double()).to(other.bias.dtype)
        other.bias = nn.Parameter(bias, other.bias.requires_grad)
        self.bias = None

    def fold_into(self, conv: nn.Conv2d) -> None:
        """Makes the convolution whose output this affine takes compute both."""
        fold_affine_into_previous(conv, self.weight.flatten(), self.bias)


class Shortcut(nn.Module):
    """An unscaled shortcut, in the place of a `ChannelAffine`."""

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Their sum, (B, C, H, W)."""
        return x if addend is None else x + addend
