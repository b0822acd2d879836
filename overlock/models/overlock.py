"""The network: Base-Net, Overview-Net and Focus-Net (paper, Fig. 3), and the ImageNet classifier."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import ConvNorm, DilatedReparamConv
from overlock.layers.fold import BatchNorm, fold_bn_into_next, switch_children
from overlock.models.arch import Arch, get_arch
from overlock.models.blocks import DynamicBlock, StaticBlock
from overlock.models.names import check_form, form_of, from_published
from overlock.ops.contmix.dispatch import check_backend
from overlock.utils.errors import CheckpointError

MIN_SIZE = 32


def run_block(block: nn.Module, *args: Tensor, with_cp: bool = False) -> Any:
    """Run a block; under `with_cp`, compute its activations again in the backward pass instead of keeping them."""
    if with_cp and torch.is_grad_enabled():
        # torch.compile makes the second run pure by itself, and takes no context for it.
        context: dict[str, Any] = (
            {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _same_statistics(block))}
        )
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **context)
    return block(*args)


@contextmanager
def _same_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the second run of a block from updating the running statistics of its BatchNorms again."""
    norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, kept, strict=True):
        norm.momentum, norm.num_batches_tracked = 0.0, count if count is None else count.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _static_stage(arch: Arch, stage: int, rates: Sequence[float]) -> nn.Sequential:
    """Build the blocks of stage 0 to 3; the two deep stages have layer scale."""
    return nn.Sequential(
        *(
            StaticBlock(
                arch.embed_dims[stage], arch.kernel_sizes[stage], arch.static_mlp_ratio, rate, layer_scale=stage >= 2
            )
            for rate in rates
        )
    )


class BaseNet(nn.Module):
    """Encode the image: stem to stride 4, stages 1 to 3 at strides 4, 8 and 16.

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
        """Compute the maps of the stages.

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
    """Look at the whole scene: a few blocks at stride 32.

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
        """Map (B, C3, H / 16, W / 16) to the overview (B, C4, H / 32, W / 32)."""
        x = self.downsample(x)
        for block in self.stage:
            x = run_block(block, x, with_cp=self.with_cp)
        return x


class FocusNet(nn.Module):
    """Look closely, guided by the overview: dynamic blocks at strides 16 and 32.

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
        if num_stages == 2:
            self.downsample = ConvNorm(c3, c4, 3, stride=2)
            self.context_downsample = ConvNorm(arch.context_dims, arch.context_dims, 3, stride=2)
            self.stage4 = stage(1)

    def forward(self, x: Tensor, overview: Tensor) -> list[Tensor]:
        """Look at `x` (B, C3, H / 16, W / 16) under the overview (B, C4, H / 32, W / 32).

        Returns:
            The maps of the stages, each joined with its context: (B, C3 + P, H / 16, W / 16) and
            (B, C4 + P, H / 32, W / 32).
        """
        coarse_prior = self.context_proj(overview)
        prior = F.interpolate(coarse_prior, x.shape[2:], mode='bilinear', align_corners=False)
        x, context = self._run(self.stage3, x, prior, prior)
        outs = [torch.cat([x, context], dim=1)]
        if self.num_stages == 2:
            x, context = self.downsample(x), self.context_downsample(context)
            outs.append(torch.cat(self._run(self.stage4, x, context, coarse_prior), dim=1))
        return outs

    def _run(self, stage: nn.ModuleList, x: Tensor, context: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        for block in stage:
            x, context = run_block(block, x, context, prior, with_cp=self.with_cp)
        return x, context


class Trunk(nn.Module):
    """Base-Net, Overview-Net and Focus-Net, up to the last output that is needed.

    It loads state dicts in our names and the published ones, at any prefix, of its own form and of earlier ones (see
    `overlock.models.names`).

    Args:
        arch: 'xt', 't', 's', 'b', a dict of the fields of `overlock.Arch`, or one.
        in_channels: Channels of the image.
        num_outputs: How many of the four outputs to compute; nets that only later ones need are left out.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory.
        contmix_backend: Backend of `overlock.ops.contmix`.

    Attributes:
        memory_format: Memory format of the maps inside; None means channels_last on CPUs, elsewhere that of the image.
    """

    memory_format: torch.memory_format | None = None

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch,
        in_channels: int = 3,
        num_outputs: int = 4,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        contmix_backend: str = 'auto',
    ) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate}')
        check_backend(contmix_backend)
        self.arch = get_arch(arch)
        self.in_channels = in_channels
        # The published order: Base-Net, Overview-Net, Focus-Net.
        last = self.arch.num_blocks - 1
        rates = [drop_path_rate * i / last for i in range(last + 1)]
        depths = (*self.arch.base_depths, self.arch.overview_depth, *self.arch.focus_depths)
        stages = [[rates.pop(0) for _ in range(depth)] for depth in depths]
        self.base_net = BaseNet(self.arch, in_channels, stages[:3], min(num_outputs, 3), with_cp)
        if num_outputs > 2:
            self.overview_net = OverviewNet(self.arch, stages[3], with_cp)
            self.focus_net = FocusNet(self.arch, stages[4:], num_outputs - 2, with_cp, contmix_backend)
        self.num_outputs = num_outputs

    @property
    def form(self) -> str:
        """Return the form of the network: 'training', 'merged' or 'folded' (see `overlock.models.names`)."""
        return form_of(self.state_dict()) or 'training'

    def to_form(self, form: str) -> 'Trunk':
        """Merge or fold the network in place, and return it.

        Raises:
            CheckpointError: If the network already has a later form.
        """
        check_form(self.form, form, 'the network')
        if form == 'merged':
            for module in self.modules():
                if isinstance(module, DilatedReparamConv):
                    module.switch_to_deploy()
        return self.switch_to_deploy() if form == 'folded' else self

    def unfolded(self, form: str, source: str = 'the state dict') -> 'Trunk':
        """Return a network of the same shape in the form of a file, on the meta device.

        Args:
            form: The form of the file: that of this network, or an earlier one.
            source: What to call the file in messages.

        Raises:
            CheckpointError: If the file has a later form.
        """
        check_form(form, self.form, source)
        with torch.device('meta'):
            return self._rebuilt().to_form(form)

    def _rebuilt(self) -> 'Trunk':
        """Return a new network of the same shape in the training form."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Rename published entries, and bring those of an earlier form to the form of this network.

        The network itself keeps its parameters: an optimizer may hold them already.
        """
        tensors = from_published(state_dict, prefix)
        below = {name.removeprefix(prefix): value for name, value in tensors.items()}
        form = form_of(below)
        if form not in (None, self.form):
            tensors = {f'{prefix}{name}': value for name, value in self._in_own_form(below, form).items()}
        # In place: the children are given what is in `state_dict` after this.
        state_dict.clear()
        state_dict.update(tensors)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _in_own_form(self, tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
        """Merge or fold the tensors of another form; those that no network of this shape has stay as they are.

        Raises:
            CheckpointError: If one of the nets, or another part, is there in part only.
        """
        twin, dtype = self.unfolded(form), next(self.parameters()).dtype
        wide = {
            name: value.to(torch.promote_types(value.dtype, dtype)) if value.is_floating_point() else value
            for name, value in tensors.items()
        }
        own = {name: wide[name] for name in twin.state_dict() if name in wide}
        missing = twin.load_state_dict(own, strict=False, assign=True).missing_keys
        parts = {name.partition('.')[0] for name in own}
        gaps = [name for name in missing if name.partition('.')[0] in parts]
        if gaps:
            raise CheckpointError(
                f'the state dict has the {form} form and lacks {len(gaps)} tensors (first {gaps[0]}), without which it '
                f'cannot be brought to the {self.form} form of the model; give a whole file'
            )
        brought = twin.to_form(self.form).state_dict()
        return {
            **{name: value for name, value in brought.items() if name.partition('.')[0] in parts},
            **{name: value for name, value in tensors.items() if name not in own},
        }

    def init_parameters(self) -> None:
        """Give convolutions truncated normal weights with std 0.02 and zero biases; the rest stays as built."""
        for module in self.modules():
            # On the meta device there is nothing to draw, and torch takes seconds over it.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, x: Tensor, stage2_norm: nn.Module | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Compute the outputs that the network is built for, and the overview.

        Args:
            x: Image (B, in_channels, H, W), at least 32x32.
            stage2_norm: See `BaseNet`.

        Returns:
            Up to four maps at strides 4, 8, 16 and 32, all raw but the second, which is normed by `stage2_norm`; and
            the overview, if the third or fourth output is there.

        Raises:
            ValueError: If the image is smaller, has other channels, or is not a batch.
        """
        if x.ndim != 4:
            raise ValueError(f'input must have shape (B, C, H, W), got {tuple(x.shape)}; stack images into a batch')
        if x.shape[1] != self.in_channels:
            raise ValueError(
                f'input must have {self.in_channels} channels, got {x.shape[1]}; build the network with '
                f'in_channels={x.shape[1]}, or convert the image'
            )
        if min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(
                f'input must be at least {MIN_SIZE}x{MIN_SIZE} pixels, got {x.shape[2]}x{x.shape[3]}; enlarge or pad it'
            )
        # oneDNN's depthwise kernels are up to 20 times faster in channels_last.
        memory_format = self.memory_format or (torch.channels_last if x.device.type == 'cpu' else None)
        if memory_format is not None:
            x = x.contiguous(memory_format=memory_format)
        outs = self.base_net(x, stage2_norm)
        if self.num_outputs <= 2:
            return outs, None
        overview = self.overview_net(outs[2])
        return [*outs[:2], *self.focus_net(outs[2], overview)], overview

    def switch_to_deploy(self) -> 'Trunk':
        """Fold all linear steps for inference, in place and idempotently, and return self.

        The running statistics become part of the weights in either mode. In training drop path still drops branches,
        with the bias of the layer scale that was folded into them.
        """
        switch_children(self)
        return self


class Head(nn.Module):
    """The classifier: 1x1 convolution to 1024 channels, average pooling, linear layer as a 1x1 convolution."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.proj: nn.Module = ConvNorm(channels, 1024, act=nn.SiLU())
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Conv2d(1024, num_classes, 1)


class AuxHead(nn.Module):
    """The classifier of Overview-Net: BatchNorm, average pooling, linear layer as a 1x1 convolution."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm2d(channels)
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map the overview (B, C4, H, W) to logits (B, num_classes, 1, 1)."""
        return self.fc(self.pool(self.bn(x)))

    def switch_to_deploy(self) -> None:
        """Fold the BatchNorm into the linear layer, in place and idempotently: pooling between them is linear too."""
        if isinstance(self.bn, BatchNorm) and isinstance(self.fc, nn.Conv2d):
            fold_bn_into_next(self.bn, self.fc)
            self.bn = nn.Identity()


class OverLoCK(Trunk):
    """The ImageNet classifier.

    Args:
        arch: 'xt', 't', 's', 'b', a dict of the fields of `overlock.Arch`, or one.
        in_channels: Channels of the image.
        num_classes: Classes.
        aux_head: Whether Overview-Net has a classifier of its own for training.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory.
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
        with_cp: bool = False,
        deploy: bool = False,
        contmix_backend: str = 'auto',
    ) -> None:
        if num_classes < 1:
            raise ValueError(f'num_classes must be at least 1, got {num_classes}')
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

        Raises:
            ValueError: If the image is smaller than 32x32 or has other channels.
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
