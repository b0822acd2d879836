"""Base-Net, Overview-Net and Focus-Net (paper, Fig. 3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.arch import Arch
from overlock.blocks import DynamicBlock, StaticBlock
from overlock.layers import ConvNorm


def run_block(block: nn.Module, *args: Tensor, with_cp: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Runs a block; under `with_cp` its activations are computed again in the backward pass and not kept."""
    if with_cp and torch.is_grad_enabled():
        # torch.compile makes the second run pure by itself, and takes no context for it.
        context = (
            {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _same_statistics(block))}
        )
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **context)
    return block(*args)


@contextmanager
def _same_statistics(block: nn.Module) -> Iterator[None]:
    """Keeps the second run of a block from moving the running statistics of its BatchNorms again."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, kept, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _static_stage(arch: Arch, stage: int, rates: Sequence[float]) -> nn.Sequential:
    """The blocks of stage 0 to 3; the two deep stages have layer scale."""
    return nn.Sequential(
        *(
            StaticBlock(
                arch.embed_dims[stage], arch.kernel_sizes[stage], arch.static_mlp_ratio, rate, layer_scale=stage >= 2
            )
            for rate in rates
        )
    )


class BaseNet(nn.Module):
    """Encodes the image: stem to stride 4, stages 1 to 3 at strides 4, 8 and 16.

    Args:
        arch: The variant.
        in_channels: Channels of the image.
        rates: Drop-path rates, a list for each stage.
        num_stages: How many of the three stages are built.
        with_cp: Whether to checkpoint blocks.
    """

    def __init__(
        self, arch: Arch, in_channels: int, rates: Sequence[Sequence[float]], num_stages: int = 3, with_cp: bool = False
    ) -> None:
        super().__init__()
        c1, c2, c3, _ = arch.embed_dims
        half = c1 // 2
        self.num_stages = num_stages
        self.with_cp = with_cp
        self.stem = nn.Sequential(
            ConvNorm(in_channels, half, 3, stride=2, act=nn.GELU()),
            ConvNorm(half, half, 3, act=nn.GELU()),
            ConvNorm(half, c1, 3, stride=2, act=nn.GELU()),
            ConvNorm(c1, c1, 3),
        )
        self.stage1 = _static_stage(arch, 0, rates[0])
        if num_stages > 1:
            self.downsample2 = ConvNorm(c1, c2, 3, stride=2)
            self.stage2 = _static_stage(arch, 1, rates[1])
        if num_stages > 2:
            self.downsample3 = ConvNorm(c2, c3, 3, stride=2)
            self.stage3 = _static_stage(arch, 2, rates[2])

    def forward(self, x: Tensor, stage2_norm: nn.Module | None = None) -> list[Tensor]:
        """Encodes an image.

        Args:
            x: (B, C, H, W).
            stage2_norm: Norm of the second map, which stage 3 then takes too: how the published dense-prediction
                networks were trained, unlike the classifier.

        Returns:
            The maps of the stages, (B, C_i, H / 2^(i+1), W / 2^(i+1)), rounded up.
        """
        outs = [self._run(self.stage1, self.stem(x))]
        if self.num_stages > 1:
            outs.append(self._run(self.stage2, self.downsample2(outs[0])))
            if stage2_norm is not None:
                outs[1] = stage2_norm(outs[1])
        if self.num_stages > 2:
            outs.append(self._run(self.stage3, self.downsample3(outs[1])))
        return outs

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        for block in stage:
            x = run_block(block, x, with_cp=self.with_cp)
        return x


class OverviewNet(nn.Module):
    """Looks at the whole scene: a few blocks at stride 32.

    Args:
        arch: The variant.
        rates: Drop-path rate of each block.
        with_cp: Whether to checkpoint blocks.
    """

    def __init__(self, arch: Arch, rates: Sequence[float], with_cp: bool = False) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.downsample = ConvNorm(arch.embed_dims[2], arch.embed_dims[3], 3, stride=2)
        self.stage = _static_stage(arch, 3, rates)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C3, H / 16, W / 16) to the overview (B, C4, H / 32, W / 32)."""
        x = self.downsample(x)
        for block in self.stage:
            x = run_block(block, x, with_cp=self.with_cp)
        return x


class FocusNet(nn.Module):
    """Looks closely under the guidance of the overview: dynamic blocks at strides 16 and 32.

    Args:
        arch: The variant.
        rates: Drop-path rates, a list for each of the two stages.
        num_stages: 2, or 1 to leave the stage at stride 32 out.
        with_cp: Whether to checkpoint blocks.
        contmix_backend: Backend of `overlock.ops.contmix`.
    """

    def __init__(
        self,
        arch: Arch,
        rates: Sequence[Sequence[float]],
        num_stages: int = 2,
        with_cp: bool = False,
        contmix_backend: str = 'auto',
    ) -> None:
        super().__init__()
        _, _, c3, c4 = arch.embed_dims
        self.with_cp = with_cp
        self.num_stages = num_stages
        self.context_proj = nn.Conv2d(c4, arch.context_dims, 1)

        def stage(index: int) -> nn.ModuleList:
            last = len(rates[index]) - 1
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
                    split=(index, i) != (1, last),
                    contmix_backend=contmix_backend,
                )
                for i, rate in enumerate(rates[index])
            )

        self.stage3 = stage(0)
        if num_stages == 2:
            self.downsample = ConvNorm(c3, c4, 3, stride=2)
            self.context_downsample = ConvNorm(arch.context_dims, arch.context_dims, 3, stride=2)
            self.stage4 = stage(1)

    def forward(self, x: Tensor, overview: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Looks at `x` (B, C3, H / 16, W / 16) under the overview (B, C4, H / 32, W / 32).

        Returns:
            Features (B, C3, ...) and context (B, P, ...) at stride 16, and the last map (B, C4 + P, H / 32, W / 32),
            or None without the second stage.
        """
        coarse_prior = self.context_proj(overview)
        prior = F.interpolate(coarse_prior, x.shape[2:], mode='bilinear', align_corners=False)
        context = prior
        for block in self.stage3:
            x, context = run_block(block, x, context, prior, with_cp=self.with_cp)
        if self.num_stages == 1:
            return (x, context), None
        y = self.downsample(x), self.context_downsample(context)
        for block in self.stage4:
            y = run_block(block, *y, coarse_prior, with_cp=self.with_cp)
        return (x, context), y
