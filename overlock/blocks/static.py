"""The block of Base-Net and Overview-Net (paper, Sec. 3.2)."""

from torch import Tensor, nn

from overlock.layers import (
    ChannelAffine,
    ConvFFN,
    DilatedReparamConv,
    DropPath,
    LayerNorm2d,
    ResidualDWConv,
    SqueezeExcite,
)


class StaticBlock(nn.Module):
    """Large-kernel block: mixes space with a dilated re-parameterised convolution, then channels with a ConvFFN.

    Args:
        channels: Channels in and out.
        kernel_size: The large kernel, a key of `overlock.layers.dilated.BRANCHES`.
        mlp_ratio: Hidden width of the feed-forward over `channels`.
        drop_path_rate: Probability of dropping the branch of a sample.
        layer_scale: Whether the shortcut is scaled by a learned affine a channel.
        deploy: Whether to build the merged form.
    """

    def __init__(self, channels: int, kernel_size: int, mlp_ratio: int = 4, drop_path_rate: float = 0.0,
                 layer_scale: bool = False, deploy: bool = False) -> None:
        super().__init__()
        self.dwconv = ResidualDWConv(channels)
        self.norm = LayerNorm2d(channels)
        self.dilated = DilatedReparamConv(channels, kernel_size, deploy)
        self.bn = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels)
        self.ffn = ConvFFN(channels, channels * mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)
        self.ls = ChannelAffine(channels) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = self.dwconv(x)
        y = self.se(self.bn(self.dilated(self.norm(x))))
        return self.ls(x) + self.drop_path(self.ffn(y))
