"""Depthwise convolutions, one of them with a shortcut, the 1x1 convolution, and a convolution with its BatchNorm."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers.fold import BatchNorm, bn_affine, fold_into_previous, set_conv
from overlock.ops.depthwise import depthwise_conv2d
from overlock.ops.pointwise import pointwise_conv2d


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether an operator may compute what this module does: it has no hooks, and nothing replaced it."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return type(module) is kind and not any(hooks) and 'forward' not in vars(module)


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution that keeps the size of the map."""

    def __init__(self, channels: int, kernel_size: int, dilation: int = 1, bias: bool = True) -> None:
        padding = kernel_size // 2 * dilation
        super().__init__(channels, channels, kernel_size, 1, padding, dilation, channels, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        return depthwise_conv2d(x, self.weight, self.bias, self.dilation[0])


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        return pointwise_conv2d(x, self.weight, self.bias)


class ConvNorm(nn.Module):
    """A convolution, then BatchNorm, then an optional activation.

    The kernel size is odd, and padded so that an input side of n becomes ceil(n / stride).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2
        if (kernel_size, stride, groups) == (1, 1, 1):
            self.conv: nn.Conv2d = PointwiseConv(in_channels, out_channels, bias)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, 1, groups, bias)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels)
        self.act = act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, ceil(H / stride), ceil(W / stride))."""
        return self.act(self.bn(self.conv(x)))

    def switch_to_deploy(self) -> None:
        """Fold the BatchNorm into the convolution, in place and idempotently."""
        if isinstance(self.bn, BatchNorm):
            fold_into_previous(self.conv, *bn_affine(self.bn))
            self.bn = nn.Identity()


class ResidualDWConv(nn.Conv2d):
    """A depthwise 3x3 convolution around a shortcut, `x + conv(x)`, which folding moves into the kernels."""

    bias: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)
        self.shortcut = True

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        y = super().forward(x)
        return x + y if self.shortcut else y

    def kernels(self) -> Tensor:
        """Return the kernels (C, 1, 3, 3) with the shortcut."""
        return self.weight + F.pad(self.weight.new_ones(1, 1, 1, 1), (1, 1, 1, 1)) if self.shortcut else self.weight

    @torch.no_grad()
    def switch_to_deploy(self) -> None:
        """Fold the shortcut into the kernels, in place and idempotently: they get 1 more at the center."""
        if self.shortcut:
            weight = self.weight.double().clone()
            weight[..., 1, 1] += 1
            set_conv(self, weight, self.bias)
            self.shortcut = False
