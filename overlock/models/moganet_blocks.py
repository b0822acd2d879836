"""The parts of MogaNet in the order of the paper: spatial and channel aggregation, their block, the patch embeddings.

The names of modules and parameters are the published ones, so published state dicts load without translation. Where
paper and published code differ, this is the code, which the published weights belong to: inside the layer scale the
spatial branch has a shortcut, and its feature decomposition ends with SiLU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import DropPath, PointwiseConv
from overlock.layers.conv import DepthwiseConv
from overlock.layers.fold import BatchNorm, bn_affine, fold_into_next, fold_into_previous
from overlock.models.network import Block
from overlock.ops.pointwise import pointwise_conv2d


class ElementScale(nn.Module):
    """A learned factor for each channel, (1, C, 1, 1), that starts at 1e-5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1), 1e-5))


class MultiOrderDWConv(nn.Module):
    """Depthwise convolutions of three reaches: 5x5 on all channels, after it dilated ones on two groups of them.

    Of C channels, the first C / 8 stay as they are, the next 3C / 8 get 5x5 with dilation 2, the last C / 2 get 7x7
    with dilation 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = (channels // 8, channels * 3 // 8, channels // 2)
        self.DW_conv0 = DepthwiseConv(channels, 5)
        self.DW_conv1 = DepthwiseConv(self.groups[1], 5, dilation=2)
        self.DW_conv2 = DepthwiseConv(self.groups[2], 7, dilation=3)
        self.PW_conv = PointwiseConv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        near, middle, far = self.DW_conv0(x).split(self.groups, dim=1)
        return self.PW_conv(torch.cat([near, self.DW_conv1(middle), self.DW_conv2(far)], dim=1))


class MultiOrderGatedAggregation(nn.Module):
    """Mix space: feature decomposition, then multi-order context gated by the map itself (paper, Sec. 4.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_1 = PointwiseConv(channels, channels)
        self.gate = PointwiseConv(channels, channels)
        self.value = MultiOrderDWConv(channels)
        self.proj_2 = PointwiseConv(channels, channels)
        self.sigma = ElementScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape; the shortcut around it is the block's."""
        x = F.silu(self.decompose_features(self.proj_1(x)))
        return self.proj_2(F.silu(self.gate(x)) * F.silu(self.value(x)))

    def decompose_features(self, x: Tensor) -> Tensor:
        """Return `x + sigma * (x - mean of x over space)`, in one pass over `x`."""
        scale = self.sigma.scale.to(x.dtype)
        return torch.addcmul(-scale * x.mean((2, 3), keepdim=True), x, 1 + scale)


class ChannelAggregationFFN(nn.Module):
    """Mix channels: a feed-forward with a depthwise 3x3, in which all channels are compared with one that sums them up.

    On the hidden map h the published network computes `h + sigma * (h - GELU(decompose(h)))`, then `fc2`.

    Args:
        channels: Channels in and out.
        hidden: Channels between.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = PointwiseConv(channels, hidden)
        self.dwconv = DepthwiseConv(hidden, 3)
        self.fc2 = PointwiseConv(hidden, channels)
        self.decompose = PointwiseConv(hidden, 1)
        self.sigma = ElementScale(hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        hidden = F.gelu(self.dwconv(self.fc1(x)))
        common = F.gelu(self.decompose(hidden))
        # All but `common` is linear: scaling the weights of fc2 saves three passes over the wide map.
        weight = self.fc2.weight
        scaled = weight * self.sigma.scale
        wide = pointwise_conv2d(hidden, weight + scaled, self.fc2.bias)
        return wide - pointwise_conv2d(common, scaled.sum(1, keepdim=True))


class MogaBlock(Block):
    """Mix space, then channels, each behind a BatchNorm and scaled by a layer scale.

    Folded, no BatchNorm and no layer scale is left; what they do to the shortcuts are two scales.

    Args:
        channels: Channels in and out.
        ffn_ratio: Hidden width of the feed-forward over `channels`.
        drop_path_rate: Probability of dropping a branch of a sample; a folded block drops none.
    """

    shortcut_scale_1: nn.Parameter | None
    shortcut_scale_2: nn.Parameter | None

    def __init__(self, channels: int, ffn_ratio: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((1, channels, 1, 1), 1e-5))
        self.layer_scale_2 = nn.Parameter(torch.full((1, channels, 1, 1), 1e-5))
        self.register_parameter('shortcut_scale_1', None)
        self.register_parameter('shortcut_scale_2', None)
        self.norm1: nn.Module = nn.BatchNorm2d(channels)
        self.attn = MultiOrderGatedAggregation(channels)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2: nn.Module = nn.BatchNorm2d(channels)
        self.mlp = ChannelAggregationFFN(channels, channels * ffn_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        if self.shortcut_scale_1 is not None and self.shortcut_scale_2 is not None:
            x = torch.addcmul(self.attn(x), x, self.shortcut_scale_1)
            return torch.addcmul(self.mlp(x), x, self.shortcut_scale_2)
        y = self.norm1(x)
        x = torch.addcmul(x, self.drop_path(y + self.attn(y)), self.layer_scale_1)
        return torch.addcmul(x, self.drop_path(self.mlp(self.norm2(x))), self.layer_scale_2)

    def switch_to_deploy(self) -> None:
        """Fold all BatchNorms and layer scales, in place and idempotently."""
        if not (isinstance(self.norm1, BatchNorm) and isinstance(self.norm2, BatchNorm)):
            return
        layer_scale_1, layer_scale_2 = (
            scale.detach().double().flatten() for scale in (self.layer_scale_1, self.layer_scale_2)
        )
        scale, shift = bn_affine(self.norm1)
        fold_into_next(scale, shift, self.attn.proj_1)
        # The shortcut inside the branch: layer_scale * (norm(x) + proj_2(...)).
        fold_into_previous(self.attn.proj_2, layer_scale_1, layer_scale_1 * shift)
        self.shortcut_scale_1 = _like(self.layer_scale_1, 1 + layer_scale_1 * scale)
        fold_into_next(*bn_affine(self.norm2), self.mlp.fc1)
        fold_into_previous(self.mlp.fc2, layer_scale_2, torch.zeros_like(layer_scale_2))
        self.shortcut_scale_2 = _like(self.layer_scale_2, torch.ones_like(layer_scale_2))
        self.norm1 = self.norm2 = nn.Identity()
        del self.layer_scale_1, self.layer_scale_2

    def fold_next(self, norm: BatchNorm) -> None:
        """Fold the BatchNorm that takes the output of this block, which is folded itself, into it."""
        assert self.shortcut_scale_2 is not None
        scale, shift = bn_affine(norm)
        fold_into_previous(self.mlp.fc2, scale, shift)
        self.shortcut_scale_2 = _like(self.shortcut_scale_2, self.shortcut_scale_2.double().flatten() * scale)


def _like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().view_as(old).to(old.dtype), old.requires_grad)


class StackConvPatchEmbed(nn.Module):
    """The stem: two 3x3 convolutions with stride 2, each with a BatchNorm, and GELU between them."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels // 2),
            nn.GELU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / 4, W / 4), rounded up."""
        return self.projection(x)

    def switch_to_deploy(self) -> None:
        """Fold the BatchNorms into the convolutions, in place and idempotently."""
        for i in (1, 4):
            conv, norm = self.projection[i - 1], self.projection[i]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm):
                fold_into_previous(conv, *bn_affine(norm))
                self.projection[i] = nn.Identity()


class ConvPatchEmbed(nn.Module):
    """Downsampling between stages: a 3x3 convolution with stride 2 and a BatchNorm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / 2, W / 2), rounded up."""
        return self.norm(self.projection(x))

    def switch_to_deploy(self) -> None:
        """Fold the BatchNorm into the convolution, in place and idempotently."""
        if isinstance(self.norm, BatchNorm):
            fold_into_previous(self.projection, *bn_affine(self.norm))
            self.norm = nn.Identity()
