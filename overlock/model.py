"""The classifier and the dense-prediction backbone, on one trunk."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from overlock.arch import Arch, get_arch
from overlock.checkpoint.forms import fold_state_dict, form_of, must_fold
from overlock.checkpoint.names import from_published, published_name
from overlock.layers import ChannelAffine, ConvNorm, DilatedReparamConv, LayerNorm2d
from overlock.nets import BaseNet, FocusNet, OverviewNet
from overlock.ops.contmix.dispatch import check_backend
from overlock.reparam import fold_bn_into_next, switch_children

MIN_SIZE = 32


class Trunk(nn.Module):
    """Base-Net, Overview-Net and Focus-Net, as far as the outputs asked for need them.

    Loads state dicts in its own and in the published names, at any prefix; once folded for inference also those of
    unfolded networks.

    Args:
        arch: 'xt', 't', 's', 'b', a dict of the fields of `overlock.Arch`, or one.
        in_channels: Channels of the image.
        num_outputs: How many of the four outputs are computed; the nets behind the last of them are left out.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory.
        contmix_backend: Backend of `overlock.ops.contmix`.

    Attributes:
        memory_format: What maps have inside; None for channels_last on CPUs and for that of the image elsewhere.
    """

    memory_format: torch.memory_format | None = None

    def __init__(
        self,
        arch: str | Mapping | Arch,
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

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given_names = from_published({name: name for name in state_dict}, prefix)
        tensors = {ours: state_dict[given] for ours, given in given_names.items()}
        below = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        form, own = form_of(below), self.state_dict()
        if must_fold(form, form_of(own)):
            folded = fold_state_dict(below, own, lambda: self.unfolded(form))
            tensors = {f'{prefix}{name}': value for name, value in folded.tensors.items()}
            published = any(ours != given for ours, given in given_names.items())
            if strict:
                missing = (f'{prefix}{name}' for name in folded.missing)
                missing_keys += [published_name(name, prefix) if published else name for name in missing]
                unexpected_keys += [given_names[f'{prefix}{name}'] for name in folded.unexpected]
            error_msgs += [
                f'size mismatch for {given_names[prefix + name]}: the state dict has {got}, the model needs {wanted}.'
                for name, (wanted, got) in folded.misfits.items()
            ]
        # In place: the children are given what is in `state_dict` after this.
        state_dict.clear()
        state_dict.update(tensors)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def unfolded(self, form: str = 'training') -> 'Trunk':
        """A network of the same shape on the meta device, in the form 'training' or 'merged' of `checkpoint.forms`."""
        with torch.device('meta'):
            twin = self._rebuilt()
        return twin.merge() if form == 'merged' else twin

    def merge(self) -> 'Trunk':
        """Merges the branches of the large kernels alone, in place, as published _reparam files have them."""
        for module in self.modules():
            if isinstance(module, DilatedReparamConv):
                module.switch_to_deploy()
        return self

    def _rebuilt(self) -> 'Trunk':
        """A new network of the same shape, unfolded."""
        raise NotImplementedError

    def init_parameters(self) -> None:
        """Truncated normal weights with std 0.02 and zero biases, for convolutions; the rest starts as built."""
        for module in self.modules():
            # On the meta device there is nothing to draw, and torch takes seconds over it.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(
        self, x: Tensor, stage2_norm: nn.Module | None = None
    ) -> tuple[list[Tensor | tuple[Tensor, Tensor]], Tensor | None]:
        """Image (B, C, H, W) to up to four outputs, the third a pair, and the overview.

        All are raw but the second, which is normed where `stage2_norm` is given (see `BaseNet`).

        Raises:
            ValueError: If the image is smaller than 32x32 or not a batch of maps.
        """
        if x.ndim != 4:
            raise ValueError(f'input must have shape (B, C, H, W), got {tuple(x.shape)}')
        if min(x.shape[2:]) < MIN_SIZE:
            raise ValueError(f'input must be at least {MIN_SIZE}x{MIN_SIZE} pixels, got {x.shape[2]}x{x.shape[3]}')
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
        """Folds all that is linear for inference, in place and idempotently; returns self.

        Running statistics become part of the weights whatever the mode, and no BatchNorm is left to move in `train`.
        Drop path still drops branches there; the bias of a layer scale is then part of the branch.
        """
        switch_children(self)
        return self


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
        arch: str | Mapping | Arch = 'xt',
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
        self.head = nn.Sequential()
        self.head.add_module('proj', ConvNorm(self.arch.out_channels[3], 1024, act=nn.SiLU()))
        self.head.add_module('pool', nn.AdaptiveAvgPool2d(1))
        self.head.add_module('fc', nn.Conv2d(1024, num_classes, 1))
        self.aux_head = None
        if aux_head:
            self.aux_head = nn.Sequential()
            self.aux_head.add_module('bn', nn.BatchNorm2d(self.arch.embed_dims[3]))
            self.aux_head.add_module('pool', nn.AdaptiveAvgPool2d(1))
            self.aux_head.add_module('fc', nn.Conv2d(self.arch.embed_dims[3], num_classes, 1))
        self.init_parameters()
        if deploy:
            self.switch_to_deploy()

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Image (B, C, H, W) to logits (B, num_classes); in training with `aux_head` to `main` and `aux` logits.

        Raises:
            ValueError: If the image is smaller than 32x32.
        """
        outs, overview = self.encode(x)
        logits = self.head(outs[3]).flatten(1)
        if self.training and self.aux_head is not None:
            return {'main': logits, 'aux': self.aux_head(overview).flatten(1)}
        return logits

    def switch_to_deploy(self) -> 'OverLoCK':
        """See `Trunk.switch_to_deploy`."""
        super().switch_to_deploy()
        if self.aux_head is not None and not isinstance(self.aux_head.bn, nn.Identity):
            # Pooling is linear too: the BatchNorm folds through it.
            fold_bn_into_next(self.aux_head.bn, self.aux_head.fc)
            self.aux_head.bn = nn.Identity()
        return self

    def _rebuilt(self) -> 'OverLoCK':
        return OverLoCK(
            self.arch, self.base_net.stem[0].conv.in_channels, self.head.fc.out_channels, self.aux_head is not None
        )


class OverLoCKBackbone(Trunk):
    """The dense-prediction backbone: four maps at strides 4, 8, 16 and 32.

    It has no classifier and no auxiliary head, and of the nets only what `out_indices` needs: each parameter gets a
    gradient.

    Args:
        arch: 'xt', 't', 's', 'b', a dict of the fields of `overlock.Arch`, or one.
        in_channels: Channels of the image.
        out_indices: Which of the four outputs to return, in ascending order.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and stages 1 to k (stages 1 to 3 are Base-Net's,
            stage 4 is Overview-Net); Focus-Net is never frozen.
        norm_eval: Whether all BatchNorms stay in evaluation mode while training.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory.
        deploy: Whether to build the folded form of `switch_to_deploy`.
        overview_residual: Whether the normed and projected overview is added to the last output: on for detection,
            off for segmentation. Published checkpoints of each load only into their own form.
        contmix_backend: Backend of `overlock.ops.contmix`.

    Attributes:
        out_channels: Channels of the outputs, in the order of `out_indices`.
    """

    def __init__(
        self,
        arch: str | Mapping | Arch = 'xt',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        deploy: bool = False,
        overview_residual: bool = True,
        contmix_backend: str = 'auto',
    ) -> None:
        indices = tuple(out_indices) if isinstance(out_indices, Sequence) else (out_indices,)
        if not indices or list(indices) != sorted(set(indices)) or not set(indices) <= set(range(4)):
            raise ValueError(f'out_indices must be ascending and among 0 to 3, got {indices}')
        if frozen_stages not in range(-1, 5):
            raise ValueError(f'frozen_stages must be between -1 and 4, got {frozen_stages}')
        super().__init__(arch, in_channels, indices[-1] + 1, drop_path_rate, with_cp, contmix_backend)
        self.out_indices = indices
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        channels = self.arch.out_channels
        self.out_channels = tuple(channels[i] for i in indices)
        # Stage 3 takes the normed second output, so that norm is there even where the output is not asked for.
        normed = sorted({*indices, 1}) if indices[-1] > 1 else indices
        self.output_norms = nn.ModuleDict({f'out{i}': LayerNorm2d(channels[i]) for i in normed})
        self.overview_residual = overview_residual and 3 in indices
        if self.overview_residual:
            self.output_norms['overview'] = LayerNorm2d(self.arch.embed_dims[3])
            self.overview_proj = nn.Conv2d(self.arch.embed_dims[3], channels[3], 1)
            self.overview_scale = ChannelAffine(channels[3], init_value=1e-5)
        self.init_parameters()
        if deploy:
            self.switch_to_deploy()
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Image (B, C, H, W), at least 32x32, to a map (B, C_i, H / 2^(i+2), W / 2^(i+2)), rounded up, for each output.

        Raises:
            ValueError: If the image is smaller than 32x32.
        """
        outs, overview = self.encode(x, self.output_norms['out1'] if self.num_outputs > 1 else None)
        normed = []
        for i in self.out_indices:
            out = torch.cat(outs[i], dim=1) if i == 2 else outs[i]
            if i != 1:
                out = self.output_norms[f'out{i}'](out)
            if i == 3 and self.overview_residual:
                out = out + self.overview_scale(self.overview_proj(self.output_norms['overview'](overview)))
            # mmcv's RoIAlign reads memory as if it were contiguous, whatever the format says.
            normed.append(out.contiguous())
        return tuple(normed)

    def switch_to_deploy(self) -> 'OverLoCKBackbone':
        """See `Trunk.switch_to_deploy`."""
        super().switch_to_deploy()
        if self.overview_residual and not isinstance(self.overview_scale, nn.Identity):
            self.output_norms['overview'].fold_affine_into(self.overview_proj)
            self.overview_scale.fold_into(self.overview_proj)
            self.overview_scale = nn.Identity()
        return self

    def _rebuilt(self) -> 'OverLoCKBackbone':
        return OverLoCKBackbone(
            self.arch,
            self.base_net.stem[0].conv.in_channels,
            self.out_indices,
            overview_residual=self.overview_residual,
        )

    def _frozen_modules(self) -> list[nn.Module]:
        base = self.base_net
        stages = [[base.stem], [base.stage1]]
        if self.num_outputs > 1:
            stages.append([base.downsample2, base.stage2])
        if self.num_outputs > 2:
            stages += [[base.downsample3, base.stage3], [self.overview_net]]
        return [module for stage in stages[: self.frozen_stages + 1] for module in stage]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> 'OverLoCKBackbone':
        """Sets the mode; what is frozen, and under `norm_eval` each BatchNorm, stays in evaluation."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self
