"""The two blocks: static in Base-Net and Overview-Net (paper, Sec. 3.2), dynamic in Focus-Net (Sec. 3.3)."""

import torch
from torch import Tensor, nn

from overlock.layers import (
    GRN,
    ChannelAffine,
    ConvFFN,
    ConvNorm,
    DilatedReparamConv,
    DropPath,
    LayerNorm2d,
    PointwiseConv,
    ResidualDWConv,
    SqueezeExcite,
)
from overlock.layers.fold import BatchNorm, bn_affine, fold_into_previous, switch_children
from overlock.models.mixing import NUM_REGIONS, MixingBlock
from overlock.models.network import Block
from overlock.ops.resize import adaptive_avg_pool2d


class StaticBlock(Block):
    """Mix space with a dilated re-parameterized large kernel, then channels with a ConvFFN.

    `kernel_size` is a key of `overlock.layers.large_kernel.BRANCHES`; with `layer_scale` the shortcut is scaled by a
    learned affine for each channel.
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
        self.bn: nn.Module = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels)
        self.ffn = ConvFFN(channels, channels * mlp_ratio)
        self.drop_path = DropPath(drop_path_rate)
        self.ls = ChannelAffine(channels) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        x = self.dwconv(x)
        y = self.se(self.bn(self.dilated(self.norm(x))))
        y = self.drop_path(self.ffn(y))
        return x + y if self.ls is None else self.ls(x, y)

    def switch_to_deploy(self) -> None:
        """Fold all linear steps, in place and idempotently."""
        if not isinstance(self.bn, BatchNorm):
            return
        switch_children(self)
        # The affine of `norm` stays: `dilated` pads its output with zeros, not with its shift.
        fold_into_previous(self.dilated.conv, *bn_affine(self.bn))
        self.bn = nn.Identity()
        if self.ls is not None:
            self.ls.move_bias_to(self.ffn.fc2)


class DynamicBlock(MixingBlock):
    """Mix features and context with kernels computed from the affinity of each pixel to 7x7 regions (ContMix).

    Args:
        channels: Channels C of the features.
        context_channels: Channels P of the context and of its prior.
        kernel_size: The large kernel K of ContMix and of the local branch.
        small_kernel_size: The small kernel of ContMix.
        num_groups: Groups G of ContMix in each half of the channels.
        local_kernel_size: The large kernel of the static local branch.
        mlp_ratio: Hidden width of the feed-forward over C.
        mix_prior: Whether the context is first mixed with its prior (all blocks of Focus-Net but the first).
        contmix_backend: Backend of `overlock.ops.contmix`.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        kernel_size: int,
        small_kernel_size: int = 5,
        num_groups: int = 8,
        local_kernel_size: int | None = None,
        mlp_ratio: int = 3,
        drop_path_rate: float = 0.0,
        mix_prior: bool = True,
        contmix_backend: str = 'auto',
    ) -> None:
        width = channels + context_channels
        super().__init__(
            width=width,
            channels=channels,
            key_channels=context_channels,
            kernel_sizes=(small_kernel_size, kernel_size),
            num_groups=num_groups,
            local_kernel_size=local_kernel_size or kernel_size,
            hidden=channels * mlp_ratio,
            fusion=nn.Sequential(
                ConvNorm(width, width, 3, groups=width, bias=True, act=nn.GELU()),
                PointwiseConv(width, channels),
                GRN(channels),
            ),
            drop_path_rate=drop_path_rate,
            contmix_backend=contmix_backend,
        )
        self.mix_prior = mix_prior
        if mix_prior:
            self.context_scale = ChannelAffine(context_channels)
            self.prior_scale = ChannelAffine(context_channels)

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, C, H, W), their context and the prior (B, P, H, W) to new features and context."""
        if self.mix_prior:
            context = self.context_scale(context, self.prior_scale(prior))
        return self._split(self.run(torch.cat([x, context], dim=1)))

    def project(self, x: Tensor, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query of the features, the key of the context, and the fused map as value."""
        features, context = self._split(x)
        return self.query(features), self.key(adaptive_avg_pool2d(context, (NUM_REGIONS, NUM_REGIONS))), fused

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and context. Two slices would have a gradient of the whole map each."""
        features, context = x.split([self.channels, x.shape[1] - self.channels], dim=1)
        return features, context

    def switch_to_deploy(self) -> None:
        """Fold all linear steps, in place and idempotently."""
        self.fold()
        if self.mix_prior and self.context_scale.bias is not None:
            self.context_scale.move_bias_to(self.prior_scale)
