"""The network: Base-Net, Overview-Net and Focus-Net (paper, Fig. 3), and the ImageNet classifier."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import ConvNorm, PointwiseConv
from overlock.layers.fold import BatchNorm, bn_affine, fold_into_next
from overlock.models.arch import Arch, get_arch
from overlock.models.blocks import DynamicBlock, StaticBlock
from overlock.models.names import NETWORK
from overlock.models.network import Network, check_counts, drop_path_rates, run_block
from overlock.ops.contmix.dispatch import check_backend

# Modules that only the output of this number, counted from 1, and later ones need.
_NEEDED_BY = {
    4: ('focus_net.downsample', 'focus_net.context_downsample', 'focus_net.stage4'),
    3: ('focus_net', 'overview_net', 'base_net.downsample3', 'base_net.stage3'),
    2: ('base_net.downsample2', 'base_net.stage2'),
}


class StaticStage(nn.Sequential):
    """The static blocks of stage 0 to 3, one for each drop-path rate; the two deep stages have layer scale."""

    def __init__(self, arch: Arch, stage: int, rates: Sequence[float]) -> None:
        channels, kernel_size = arch.embed_dims[stage], arch.kernel_sizes[stage]
        super().__init__(
            *(StaticBlock(channels, kernel_size, arch.static_mlp_ratio, rate, stage >= 2) for rate in rates)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        for block in self:
            x = run_block(block, x)
        return x


class BaseNet(nn.Module):
    """Encode the image: stem to stride 4, then stages at strides 4, 8 and 16, with a list of rates for each."""

    def __init__(self, arch: Arch, in_channels: int, rates: Sequence[Sequence[float]]) -> None:
        super().__init__()
        c1, c2, c3, _ = arch.embed_dims
        half = c1 // 2
        self.stem = nn.Sequential(
            ConvNorm(in_channels, half, 3, stride=2, act=nn.GELU()),
            ConvNorm(half, half, 3, act=nn.GELU()),
            ConvNorm(half, c1, 3, stride=2, act=nn.GELU()),
            ConvNorm(c1, c1, 3),
        )
        self.stage1 = StaticStage(arch, 0, rates[0])
        self.downsample2 = ConvNorm(c1, c2, 3, stride=2)
        self.stage2 = StaticStage(arch, 1, rates[1])
        self.downsample3 = ConvNorm(c2, c3, 3, stride=2)
        self.stage3 = StaticStage(arch, 2, rates[2])

    def forward(self, x: Tensor, num_stages: int = 3, stage2_norm: nn.Module | None = None) -> list[Tensor]:
        """Map (B, C, H, W) to the maps of the first stages, (B, C_i, H / 2^(i+1), W / 2^(i+1)), rounded up.

        Stage 3 takes the second map after `stage2_norm`: how the published dense-prediction networks were trained,
        unlike the classifier.
        """
        outs = [self.stage1(self.stem(x))]
        if num_stages > 1:
            outs.append(self.stage2(self.downsample2(outs[0])))
            if stage2_norm is not None:
                outs[1] = stage2_norm(outs[1])
        if num_stages > 2:
            outs.append(self.stage3(self.downsample3(outs[1])))
        return outs


class OverviewNet(nn.Module):
    """Look at the whole scene: a few blocks at stride 32, one for each drop-path rate."""

    def __init__(self, arch: Arch, rates: Sequence[float]) -> None:
        super().__init__()
        self.downsample = ConvNorm(arch.embed_dims[2], arch.embed_dims[3], 3, stride=2)
        self.stage = StaticStage(arch, 3, rates)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C3, H / 16, W / 16) to the overview (B, C4, H / 32, W / 32)."""
        return self.stage(self.downsample(x))


class FocusNet(nn.Module):
    """Look closely, guided by the overview: dynamic blocks at strides 16 and 32, with a list of rates for each."""

    def __init__(self, arch: Arch, rates: Sequence[Sequence[float]], contmix_backend: str = 'auto') -> None:
        super().__init__()
        _, _, c3, c4 = arch.embed_dims
        self.context_proj = PointwiseConv(c4, arch.context_dims)

        def stage(index: int) -> nn.ModuleList:
            return nn.ModuleList(
                DynamicBlock(
                    arch.embed_dims[2 + index],
                    arch.context_dims,
                    arch.dynamic_kernel_sizes[index],
                    arch.small_kernel_size,
                    arch.focus_groups[index],
                    arch.kernel_sizes[2 + index],
                    arch.dynamic_mlp_ratio,
                    rate,
                    mix_prior=(index, i) != (0, 0),
                    contmix_backend=contmix_backend,
                )
                for i, rate in enumerate(rates[index])
            )

        self.stage3 = stage(0)
        self.downsample = ConvNorm(c3, c4, 3, stride=2)
        self.context_downsample = ConvNorm(arch.context_dims, arch.context_dims, 3, stride=2)
        self.stage4 = stage(1)

    def forward(self, x: Tensor, overview: Tensor, num_stages: int = 2) -> list[Tensor]:
        """Look at `x` (B, C3, H / 16, W / 16) under the overview (B, C4, H / 32, W / 32).

        Returns:
            The maps of the one or two stages, each joined with its context: (B, C3 + P, H / 16, W / 16) and
            (B, C4 + P, H / 32, W / 32).
        """
        coarse_prior = self.context_proj(overview)
        prior = F.interpolate(coarse_prior, x.shape[2:], mode='bilinear', align_corners=False)
        x, context = self._run(self.stage3, x, prior, prior)
        outs = [torch.cat([x, context], dim=1)]
        if num_stages == 2:
            x, context = self.downsample(x), self.context_downsample(context)
            outs.append(torch.cat(self._run(self.stage4, x, context, coarse_prior), dim=1))
        return outs

    def _run(self, stage: nn.ModuleList, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        for block in stage:
            x, context = run_block(block, x, context, prior)
        return x, context


class Trunk(Network):
    """Base-Net, Overview-Net and Focus-Net, up to the last output that is needed.

    Args:
        arch: See `OverLoCK`; so are `in_channels`, `drop_path_rate`, `with_cp` and `contmix_backend`.
        num_outputs: How many of the four outputs to compute; nets that only later ones need are left out.
    """

    names = NETWORK
    new_parts = ('output_norms.', 'overview_proj.', 'overview_scale.')
    head_parts = ('head.', 'aux_head.')
    stage_parts = ('base_net.', 'overview_net.', 'focus_net.')
    stage_depth = 2
    # In the order of the forward pass: a stage of blocks, and the layers before it.
    layers_before: ClassVar[dict[str, tuple[str, ...]]] = {
        'base_net.stage1': (),
        'base_net.stage2': ('base_net.downsample2',),
        'base_net.stage3': ('base_net.downsample3',),
        'overview_net.stage': ('overview_net.downsample',),
        'focus_net.stage3': ('focus_net.context_proj',),
        'focus_net.stage4': ('focus_net.downsample', 'focus_net.context_downsample'),
    }
    block_stages = (
        ('base_net.stage1',),
        ('base_net.stage2',),
        ('base_net.stage3', 'focus_net.stage3'),
        ('overview_net.stage', 'focus_net.stage4'),
    )

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch,
        in_channels: int = 3,
        num_outputs: int = 4,
        drop_path_rate: float = 0.0,
        with_cp: bool | Sequence[int] = False,
        contmix_backend: str = 'auto',
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels)
        check_backend(contmix_backend)
        self.arch = get_arch(arch)
        self.in_channels = in_channels
        # The published order: Base-Net, Overview-Net, Focus-Net.
        depths = (*self.arch.base_depths, self.arch.overview_depth, *self.arch.focus_depths)
        rates = drop_path_rates(drop_path_rate, depths)
        self.base_net = BaseNet(self.arch, in_channels, rates[:3])
        self.overview_net = OverviewNet(self.arch, rates[3])
        self.focus_net = FocusNet(self.arch, rates[4:], contmix_backend)
        self.num_outputs = 4
        self.shorten(num_outputs)
        self.set_grad_checkpointing(with_cp)

    def shorten(self, num_outputs: int) -> None:
        """See `Network.shorten`."""
        for number in range(self.num_outputs, num_outputs, -1):
            for name in _NEEDED_BY[number]:
                parent, _, child = name.rpartition('.')
                delattr(self.get_submodule(parent), child)
        self.num_outputs = num_outputs

    def init_parameters(self) -> None:
        """Give convolutions truncated normal weights with std 0.02 and zero biases; the rest stays as built."""
        for module in self.modules():
            # On the meta device there is nothing to draw, and torch takes seconds over it.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, x: Tensor, stage2_norm: nn.Module | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Map an image (B, in_channels, H, W) to the outputs that the network is built for, and the overview.

        Returns:
            Up to four maps at strides 4, 8, 16 and 32, all raw but the second, which is normed by `stage2_norm` (see
            `BaseNet.forward`); and the overview, if the third or fourth output is there.

        Raises:
            ValueError: If the image is smaller than 32x32, has other channels, or is not a batch.
        """
        x = self.prepare(x)
        outs = self.base_net(x, min(self.num_outputs, 3), stage2_norm)
        if self.num_outputs <= 2:
            return outs, None
        overview = self.overview_net(outs[2])
        return [*outs[:2], *self.focus_net(outs[2], overview, self.num_outputs - 2)], overview


class Head(nn.Module):
    """The classifier: 1x1 convolution to 1024 channels, average pooling, linear layer as a 1x1 convolution."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.proj: nn.Module = ConvNorm(channels, 1024, act=nn.SiLU())
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = PointwiseConv(1024, num_classes)


class AuxHead(nn.Module):
    """The classifier of Overview-Net: BatchNorm, average pooling, linear layer as a 1x1 convolution."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm2d(channels)
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = PointwiseConv(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map the overview (B, C4, H, W) to logits (B, num_classes, 1, 1)."""
        return self.fc(self.pool(self.bn(x)))

    def switch_to_deploy(self) -> None:
        """Fold the BatchNorm into the linear layer, in place and idempotently: pooling between them is linear too."""
        if isinstance(self.bn, BatchNorm) and isinstance(self.fc, nn.Conv2d):
            fold_into_next(*bn_affine(self.bn), self.fc)
            self.bn = nn.Identity()


class OverLoCK(Trunk):
    """The ImageNet classifier.

    Args:
        arch: 'xt', 't', 's', 'b', a dict of the fields of `overlock.Arch`, or one.
        in_channels: Channels of the image.
        num_classes: Classes.
        aux_head: Whether Overview-Net has a classifier of its own for training.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory, see
            `Network.set_grad_checkpointing`.
        deploy: Whether to build the folded form of `switch_to_deploy`.
        contmix_backend: Backend of `overlock.ops.contmix`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch = 'xt',
        in_channels: int = 3,
        num_classes: int = 1000,
        aux_head: bool = True,
        drop_path_rate: float = 0.0,
        with_cp: bool | Sequence[int] = False,
        deploy: bool = False,
        contmix_backend: str = 'auto',
    ) -> None:
        check_counts(num_classes=num_classes)
        super().__init__(arch, in_channels, 4, drop_path_rate, with_cp, contmix_backend)
        self.num_classes = num_classes
        self.head = Head(self.arch.out_channels[3], num_classes)
        self.aux_head = AuxHead(self.arch.embed_dims[3], num_classes) if aux_head else None
        self.init_parameters()
        if deploy:
            self.switch_to_deploy()

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Classify an image (B, C, H, W).

        Returns:
            Logits (B, num_classes); in training with `aux_head` a dict of `main` and `aux` logits.
        """
        outs, overview = self.encode(x)
        logits = self.forward_head(outs[-1])
        if self.training and self.aux_head is not None:
            return {'main': logits, 'aux': self.aux_head(overview).flatten(1)}
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to the last output (B, C4 + P, H / 32, W / 32), rounded up."""
        return self.encode(x)[0][-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last output to logits (B, num_classes), or to the features (B, 1024) that `head.fc` takes."""
        x = self.head.pool(self.head.proj(x))
        x = x if pre_logits else self.head.fc(x)
        return x.flatten(1)

    def _rebuilt(self) -> 'OverLoCK':
        assert isinstance(self.head.fc, nn.Conv2d)
        return OverLoCK(self.arch, self.in_channels, self.head.fc.out_channels, self.aux_head is not None)
