"""The block of Base-Net and Overview-Net (paper, Sec. 3.2)."""

from torch import Tensor, nn

from overlock.layers import (
    ChannelAffine,
    ConvFFN,
    DilatedReparamConv,
    DropPath,
    LayerNorm2d,
    ResidualDWConv,
    Shortcut,
    SqueezeExcite,
)
from overlock.reparam import fold_bn_into_previous, switch_children


class StaticBlock(nn.Module):
    """Large-kernel block: mixes space with a dilated re-parameterised convolution, then channels with a ConvFFN.

    Args:
        channels: Channels in and out.
        kernel_size: The large kernel, a key of `overlock.layers.dilated.BRANCHES`.
        mlp_ratio: Hidden width of the feed-forward over `channels`.
        drop_path_rate: Probability of dropping the branch of a sample.
        layer_scale: Whether the shortcut is scaled by a learned affine a channel.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        mlp_ratio: int = 4,
        drop_path_rate: float = 0.0,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.dwconv = ResidualDWConv(channels)
        self.norm = LayerNorm2d(channels)
        self.dilated = DilatedReparamConv(channels, kernel_size)
        self.bn = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels)
        self.ffn = ConvFFN(channels, channels * mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)
        self.ls = ChannelAffine(channels) if layer_scale else Shortcut()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        x = self.dwconv(x)
        y = self.se(self.bn(self.dilated(self.norm(x))))
        return self.ls(x, self.drop_path(self.ffn(y)))

    def switch_to_deploy(self) -> None:
        """Folds all that is linear, in place and idempotently."""
        if isinstance(self.bn, nn.Identity):
            return
        switch_children(self)
        self.dwconv = self.dwconv.without_shortcut()
        # The affine of `norm` stays: the padding of `dilated` puts zeros where its shift would be.
        fold_bn_into_previous(self.dilated.conv, self.bn)
        self.bn = nn.Identity()
        if isinstance(self.ls, ChannelAffine):
            self.ls.fold_bias_into(self.ffn.fc2)
