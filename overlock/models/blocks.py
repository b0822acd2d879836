"""The two blocks: static in Base-Net and Overview-Net (paper, Sec. 3.2), dynamic in Focus-Net (Sec. 3.3)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import (
    GRN,
    ChannelAffine,
    ConvFFN,
    ConvNorm,
    DilatedReparamConv,
    DropPath,
    LayerNorm2d,
    ResidualDWConv,
    SqueezeExcite,
)
from overlock.layers.fold import BatchNorm, bn_affine, fold_into_next, fold_into_previous, switch_children
from overlock.models.network import Block
from overlock.ops import contmix

# Side of the grid of regions; the affinities to them make the kernels.
NUM_REGIONS = 7


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


class DynamicBlock(Block):
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

    # An attribute, so that a benchmark can put the published steps in its place.
    operator: Callable[..., Tensor] = staticmethod(contmix)

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
        super().__init__()
        width = channels + context_channels
        self.channels = channels
        self.kernel_sizes = (small_kernel_size, kernel_size)
        self.num_groups = num_groups
        self.scale = (channels / num_groups) ** -0.5
        self.contmix_backend = contmix_backend

        self.rpb_small, self.rpb_large = (
            nn.Parameter(torch.zeros(num_groups, 2 * size - 1, 2 * size - 1)) for size in self.kernel_sizes
        )
        self.mix_prior = mix_prior
        if mix_prior:
            self.context_scale = ChannelAffine(context_channels)
            self.prior_scale = ChannelAffine(context_channels)
        self.dwconv1 = ResidualDWConv(width)
        self.norm1 = LayerNorm2d(width)
        self.fusion = nn.Sequential(
            ConvNorm(width, width, 3, groups=width, bias=True, act=nn.GELU()),
            nn.Conv2d(width, channels, 1),
            GRN(channels),
        )
        self.query = ConvNorm(channels, channels // 2)
        self.key = ConvNorm(context_channels, channels // 2)
        num_taps = small_kernel_size**2 + kernel_size**2
        self.weight_proj = nn.Conv2d(NUM_REGIONS**2, num_taps, 1)
        self.dynamic_proj = ConvNorm(channels, channels)
        self.local = nn.Sequential(
            DilatedReparamConv(channels, local_kernel_size or kernel_size), nn.BatchNorm2d(channels)
        )
        self.se = SqueezeExcite(channels)
        self.gate = ConvNorm(channels, channels, act=nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1))
        self.ls1 = ChannelAffine(width)
        self.dwconv2 = ResidualDWConv(width)
        self.norm2 = LayerNorm2d(width)
        self.ffn = ConvFFN(width, channels * mlp_ratio)
        self.ls2 = ChannelAffine(width)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, C, H, W), their context and the prior (B, P, H, W) to new features and context."""
        if self.mix_prior:
            context = self.context_scale(context, self.prior_scale(prior))
        y = self.dwconv1(torch.cat([x, context], dim=1))
        y = self.ls1(y, self.drop_path(self.mix(self.norm1(y))))
        y = self.dwconv2(y)
        y = self.ls2(y, self.drop_path(self.ffn(self.norm2(y))))
        return y[:, : self.channels], y[:, self.channels :]

    def mix(self, x: Tensor) -> Tensor:
        """Mix tokens: map (B, C + P, H, W) to the same shape."""
        value = self.fusion(x)
        y = self.dynamic_proj(self.dynamic_conv(x, value)) + self.local(value)
        return self.proj(self.se(y) * self.gate(value))

    def dynamic_conv(self, x: Tensor, value: Tensor) -> Tensor:
        """Apply ContMix to `value` (B, C, H, W) with kernels computed from `x` (B, C + P, H, W)."""
        height, width = value.shape[2:]
        short, large = min(height, width), self.kernel_sizes[1]
        if short < large:
            # int(large / short * side), not side * large // short: floating-point rounding is part of the network.
            size = [large if side == short else int(large / short * side) for side in (height, width)]
            x, value = (F.interpolate(t, size, mode='bilinear', align_corners=False) for t in (x, value))
        query = self.query(x[:, : self.channels])
        key = self.key(F.adaptive_avg_pool2d(x[:, self.channels :], NUM_REGIONS))
        out = self.operator(
            query,
            key,
            value,
            self.weight_proj.weight.flatten(1),
            self.weight_proj.bias,
            self.rpb_small,
            self.rpb_large,
            kernel_sizes=self.kernel_sizes,
            num_groups=self.num_groups,
            scale=self.scale,
            backend=self.contmix_backend,
        )
        return F.adaptive_avg_pool2d(out, (height, width)) if short < large else out

    def switch_to_deploy(self) -> None:
        """Fold all linear steps, in place and idempotently."""
        (dilated, local_bn), (proj_bn, proj) = self.local, self.proj
        if not (isinstance(local_bn, BatchNorm) and isinstance(proj_bn, BatchNorm)):
            return
        assert isinstance(dilated, DilatedReparamConv) and isinstance(proj, nn.Conv2d)
        switch_children(self)
        # The affine of `norm1` and the shift of the GRN in `fusion` stay: padded convolutions follow.
        fold_into_previous(dilated.conv, *bn_affine(local_bn))
        self.local[1] = nn.Identity()
        fold_into_next(*bn_affine(proj_bn), proj)
        self.proj[0] = nn.Identity()
        self.norm2.fold_affine_into(self.ffn.fc1)
        self.ls1.move_bias_to(proj)
        self.ls2.move_bias_to(self.ffn.fc2)
        if self.mix_prior:
            self.context_scale.move_bias_to(self.prior_scale)
