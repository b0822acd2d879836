"""The feed-forward part of a block."""

from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers.conv import ResidualDWConv
from overlock.layers.norm import GRN


class ConvFFN(nn.Module):
    """1x1 convolution, GELU, residual depthwise 3x3, GRN, 1x1 convolution.

    Args:
        channels: Channels in and out.
        hidden: Channels between.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.act = nn.GELU()
        self.dwconv = ResidualDWConv(hidden)
        self.grn = GRN(hidden)
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        y = self.dwconv(self.act(self.fc1(x)))
        if self.grn.beta is None and len(y) == 1:
            # One sample has one scale: it goes into the weights, which are smaller than the map.
            weight = self.fc2.weight * self.grn.scale(y).view(1, -1, 1, 1)
            return F.conv2d(y, weight.to(self.fc2.weight.dtype), self.fc2.bias)
        return self.fc2(self.grn(y))

    def switch_to_deploy(self) -> None:
        """Folds the shortcut of the depthwise convolution and the shift of GRN, in place and idempotently."""
        if self.grn.beta is None:
            return
        self.dwconv = self.dwconv.without_shortcut()
        self.grn.fold_beta_into(self.fc2)
