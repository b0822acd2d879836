"""A learned multiply-add for each channel: layer scale, and the weights that mix contexts."""

import torch
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """`weight * x + bias` for each channel.

    Args:
        channels: Channels of the map.
        init_value: What every weight starts from; biases start from 0.
    """

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        # The shape of a depthwise 1x1 convolution, so that published tensors fit as they are.
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init_value))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same, in the dtype of `x`."""
        weight, bias = (p.view(1, -1, 1, 1).to(x.dtype) for p in (self.weight, self.bias))
        return torch.addcmul(bias, x, weight)
