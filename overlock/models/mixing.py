"""The base of the blocks with dynamic kernels: ContMix beside a local large kernel, then a feed-forward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import (
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
from overlock.layers.fold import BatchNorm, bn_affine, fold_into_next, fold_into_previous, switch_children
from overlock.models.network import Block
from overlock.ops import contmix
from overlock.ops.resize import adaptive_avg_pool2d, enlarged_size
from overlock.ops.tracing import is_free

# Side of the grid of regions; the affinities to them make the kernels.
NUM_REGIONS = 7


class MixingBlock(Block):
    """Mix tokens with ContMix and a local kernel under a gate, then channels with a ConvFFN (paper, Sec. 3.3).

    A subclass says in `project` which maps are query, key and value.

    Args:
        width: Channels in and out.
        channels: Channels C of the mixed map.
        key_channels: Channels of the map that the keys come from.
        kernel_sizes: The small kernel k and the large kernel K of ContMix.
        num_groups: Groups G of ContMix in each half of the channels.
        local_kernel_size: The large kernel of the static local branch.
        hidden: Hidden width of the feed-forward.
        fusion: What makes the mixed map (B, C, H, W) of the normed one (B, width, H, W).
        drop_path_rate: Probability of dropping the branch of a sample.
        layer_scale: Initial value of the learned affines a channel; None for none.
        scale_shortcut: Whether these scale the shortcuts, or else the branches.
        contmix_backend: Backend of `overlock.ops.contmix`.
    """

    # An attribute, so that a benchmark can put the published steps in its place.
    operator: Callable[..., Tensor] = staticmethod(contmix)

    def __init__(
        self,
        width: int,
        channels: int,
        key_channels: int,
        kernel_sizes: tuple[int, int],
        num_groups: int,
        local_kernel_size: int,
        hidden: int,
        fusion: nn.Module,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = 1.0,
        scale_shortcut: bool = True,
        contmix_backend: str = 'auto',
    ) -> None:
        super().__init__()
        self.channels = channels
        self.kernel_sizes = kernel_sizes
        self.num_groups = num_groups
        self.scale = (channels / num_groups) ** -0.5
        self.scale_shortcut = scale_shortcut
        self.contmix_backend = contmix_backend

        def scale() -> ChannelAffine | None:
            return None if layer_scale is None else ChannelAffine(width, layer_scale)

        self.rpb_small, self.rpb_large = (
            nn.Parameter(torch.zeros(num_groups, 2 * size - 1, 2 * size - 1)) for size in kernel_sizes
        )
        self.dwconv1 = ResidualDWConv(width)
        self.norm1 = LayerNorm2d(width)
        self.fusion = fusion
        self.query = ConvNorm(channels, channels // 2)
        self.key = ConvNorm(key_channels, channels // 2)
        num_taps = sum(size**2 for size in kernel_sizes)
        self.weight_proj = nn.Conv2d(NUM_REGIONS**2, num_taps, 1)
        self.dynamic_proj = ConvNorm(channels, channels)
        self.local = nn.Sequential(DilatedReparamConv(channels, local_kernel_size), nn.BatchNorm2d(channels))
        self.se = SqueezeExcite(channels)
        self.gate = ConvNorm(channels, channels, act=nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), PointwiseConv(channels, width))
        self.ls1 = scale()
        self.dwconv2 = ResidualDWConv(width)
        self.norm2 = LayerNorm2d(width)
        self.ffn = ConvFFN(width, hidden)
        self.ls2 = scale()
        self.drop_path = DropPath(drop_path_rate)

    def run(self, x: Tensor) -> Tensor:
        """Map (B, width, H, W) to the same shape: both halves of the block with their shortcuts."""
        x = self.dwconv1(x)
        x = self._join(self.ls1, x, self.mix(self.norm1(x)))
        x = self.dwconv2(x)
        return self._join(self.ls2, x, self.ffn(self.norm2(x)))

    def _join(self, scale: ChannelAffine | None, shortcut: Tensor, branch: Tensor) -> Tensor:
        if scale is None:
            return shortcut + self.drop_path(branch)
        if self.scale_shortcut:
            return scale(shortcut, self.drop_path(branch))
        return shortcut + self.drop_path(scale(branch))

    def mix(self, x: Tensor) -> Tensor:
        """Mix tokens: map (B, width, H, W) to the same shape."""
        fused = self.fusion(x)
        y = self.dynamic_proj(self.dynamic_conv(x, fused)) + self.local(fused)
        return self.proj(self.se(y) * self.gate(fused))

    def project(self, x: Tensor, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query (B, C / 2, H, W), key (B, C / 2, 7, 7) and value (B, C, H, W) of ContMix.

        Args:
            x: The normed map (B, width, H, W).
            fused: The map to mix (B, C, H, W).
        """
        raise NotImplementedError

    def dynamic_conv(self, x: Tensor, fused: Tensor) -> Tensor:
        """Apply ContMix to maps (B, width, H, W) and (B, C, H, W), enlarged where they are smaller than the kernel."""
        height, width = x.shape[2:]
        enlarge = is_free(height, width) or min(height, width) < self.kernel_sizes[1]
        if enlarge:
            size = enlarged_size(height, width, self.kernel_sizes[1])
            x, fused = (F.interpolate(t, size, mode='bilinear', align_corners=False) for t in (x, fused))
        query, key, value = self.project(x, fused)
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
        return adaptive_avg_pool2d(out, (height, width)) if enlarge else out

    def fold(self) -> None:
        """Fold all linear steps, in place and idempotently."""
        (dilated, local_bn), (proj_bn, proj) = self.local, self.proj
        if not (isinstance(local_bn, BatchNorm) and isinstance(proj_bn, BatchNorm)):
            return
        assert isinstance(dilated, DilatedReparamConv) and isinstance(proj, nn.Conv2d)
        switch_children(self)
        # The affine of `norm1` and the shift of a GRN in `fusion` stay: padded convolutions follow.
        fold_into_previous(dilated.conv, *bn_affine(local_bn))
        self.local[1] = nn.Identity()
        fold_into_next(*bn_affine(proj_bn), proj)
        self.proj[0] = nn.Identity()
        self.norm2.fold_affine_into(self.ffn.fc1)
        self.ls1, self.ls2 = self._folded(self.ls1, proj), self._folded(self.ls2, self.ffn.fc2)

    def _folded(self, scale: ChannelAffine | None, last: nn.Conv2d) -> ChannelAffine | None:
        """Fold a layer scale into the last convolution of its branch, and return what is left of it."""
        if scale is None:
            return None
        if self.scale_shortcut:
            scale.move_bias_to(last)
            return scale
        fold_into_previous(last, scale.weight.flatten(), scale.bias)
        return None

    def extra_repr(self) -> str:
        return f'kernel_sizes={self.kernel_sizes}, num_groups={self.num_groups}'
