"""MogaNet (ICLR 2024): multi-order gated aggregation in space, channel aggregation in the feed-forward."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor, nn

from overlock.layers.fold import BatchNorm
from overlock.models.arch import find_arch
from overlock.models.dense import DenseBackbone, check_out_indices, set_norms
from overlock.models.moganet_blocks import ConvPatchEmbed, MogaBlock, StackConvPatchEmbed
from overlock.models.network import Network, check_counts, drop_path_rates, run_block

Self = TypeVar('Self', bound='MogaNetTrunk')


@dataclass(frozen=True)
class MogaArch:
    """The shape of one MogaNet (paper, Table A1).

    Args:
        embed_dims: Channels of stages 1 to 4 (strides 4, 8, 16, 32), each divisible by 8.
        depths: Blocks of stages 1 to 4.
        ffn_ratios: Hidden width of the feed-forwards over the channels, in stages 1 to 4.

    Raises:
        ValueError: If a field has the wrong length or a value that no network can have.
    """

    embed_dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    ffn_ratios: tuple[int, int, int, int] = (8, 8, 4, 4)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (tuple, list)) or len(value) != 4:
                raise ValueError(f'arch: {field.name} must have 4 entries, got {value!r}')
            if not all(isinstance(entry, int) and entry > 0 for entry in value):
                raise ValueError(f'arch: {field.name} must hold positive integers, got {value!r}')
            object.__setattr__(self, field.name, tuple(value))
        if any(dims % 8 for dims in self.embed_dims):
            raise ValueError(f'arch: embed_dims must be divisible by 8, got {self.embed_dims}')

    @property
    def out_channels(self) -> tuple[int, int, int, int]:
        """Channels of the four outputs."""
        return self.embed_dims


MOGANET_ARCHS: dict[str, MogaArch] = {
    'xt': MogaArch((32, 64, 96, 192), (3, 3, 10, 2)),
    't': MogaArch((32, 64, 128, 256), (3, 3, 12, 2)),
    's': MogaArch((64, 128, 320, 512), (2, 3, 12, 2)),
    'b': MogaArch((64, 160, 320, 512), (4, 6, 22, 3)),
    'l': MogaArch((64, 160, 320, 640), (4, 6, 44, 4)),
    'xl': MogaArch((96, 192, 480, 960), (6, 6, 44, 4)),
}

# Depths for layer-wise learning-rate decay; blocks3 has several, and norms have the most.
_LAYER_IDS = {
    'patch_embed1': 0,
    'blocks1': 2,
    'patch_embed2': 3,
    'blocks2': 3,
    'patch_embed3': 4,
    'patch_embed4': 12,
    'blocks4': 12,
}


class MogaNetTrunk(Network):
    """The stages of MogaNet, up to the last one that is needed.

    Args:
        arch: 'xt', 't', 's', 'b', 'l', 'xl', a dict of the fields of `overlock.MogaArch`, or one.
        in_channels: Channels of the image.
        num_outputs: How many of the four outputs to compute; later stages are left out.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory, see
            `Network.set_grad_checkpointing`.
    """

    stage_parts = ('patch_embed', 'blocks', 'norm')
    block_stages = (('blocks1',), ('blocks2',), ('blocks3',), ('blocks4',))

    def __init__(
        self,
        arch: str | Mapping[str, Any] | MogaArch,
        in_channels: int = 3,
        num_outputs: int = 4,
        drop_path_rate: float = 0.0,
        with_cp: bool | Sequence[int] = False,
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels)
        self.arch = find_arch(arch, MogaArch, MOGANET_ARCHS)
        self.in_channels = in_channels
        self.num_outputs = num_outputs
        dims = self.arch.embed_dims
        rates = drop_path_rates(drop_path_rate, self.arch.depths)
        for i in range(num_outputs):
            embed = ConvPatchEmbed(dims[i - 1], dims[i]) if i else StackConvPatchEmbed(in_channels, dims[0])
            blocks = [MogaBlock(dims[i], self.arch.ffn_ratios[i], rate) for rate in rates[i]]
            self.add_module(f'patch_embed{i + 1}', embed)
            self.add_module(f'blocks{i + 1}', nn.ModuleList(blocks))
            self.add_module(f'norm{i + 1}', nn.BatchNorm2d(dims[i]))
        self.set_grad_checkpointing(with_cp)

    def shorten(self, num_outputs: int) -> None:
        """See `Network.shorten`."""
        for i in range(num_outputs + 1, self.num_outputs + 1):
            for name in ('patch_embed', 'blocks', 'norm'):
                delattr(self, f'{name}{i}')
        self.num_outputs = num_outputs

    @staticmethod
    def form_of(names: Iterable[str]) -> str | None:
        """Return the form that names tell, 'training' or 'folded', or None if they hold too little."""
        scales = {name.rpartition('.')[2] for name in names}
        return 'folded' if 'shortcut_scale_1' in scales else 'training' if 'layer_scale_1' in scales else None

    def stages(self) -> Iterator[tuple[nn.Module, nn.ModuleList, nn.Module]]:
        """Yield patch embedding, blocks, and norm of each stage."""
        for i in range(1, self.num_outputs + 1):
            yield getattr(self, f'patch_embed{i}'), getattr(self, f'blocks{i}'), getattr(self, f'norm{i}')

    def encode(self, x: Tensor) -> list[Tensor]:
        """Map an image (B, in_channels, H, W), at least 32x32, to the normed map of each stage.

        Returns:
            (B, C_i, H / 2^(i+1), W / 2^(i+1)) for stage i, rounded up.
        """
        x = self.prepare(x)
        outs = []
        for embed, blocks, norm in self.stages():
            x = embed(x)
            for block in blocks:
                x = run_block(block, x)
            # On the main path too: the next stage takes the normed map.
            x = norm(x)
            outs.append(x)
        return outs

    def init_parameters(self) -> None:
        """Give convolutions normal weights of variance 2 / fan_out, linear layers truncated ones; biases are zero."""
        for module in self.modules():
            # On the meta device there is nothing to draw.
            if not isinstance(module, (nn.Conv2d, nn.Linear)) or module.weight.is_meta:
                continue
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            else:
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def switch_to_deploy(self: Self) -> Self:
        """Fold every BatchNorm and layer scale for inference, in place and idempotently, and return self."""
        super().switch_to_deploy()
        for i, (_, blocks, norm) in enumerate(self.stages(), 1):
            last = blocks[-1]
            if isinstance(norm, BatchNorm):
                assert isinstance(last, MogaBlock)
                last.fold_next(norm)
                setattr(self, f'norm{i}', nn.Identity())
        return self


class MogaNet(MogaNetTrunk):
    """The ImageNet classifier.

    Args:
        arch: 'xt', 't', 's', 'b', 'l', 'xl', a dict of the fields of `overlock.MogaArch`, or one.
        in_channels: Channels of the image.
        num_classes: Classes.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory, see
            `Network.set_grad_checkpointing`.
        deploy: Whether to build the folded form of `switch_to_deploy`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | MogaArch = 'xt',
        in_channels: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        with_cp: bool | Sequence[int] = False,
        deploy: bool = False,
    ) -> None:
        check_counts(num_classes=num_classes)
        super().__init__(arch, in_channels, 4, drop_path_rate, with_cp)
        self.num_classes = num_classes
        self.head: nn.Module = nn.Linear(self.arch.embed_dims[3], num_classes)
        self.init_parameters()
        if deploy:
            self.switch_to_deploy()

    def forward(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W), at least 32x32, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Map an image (B, C, H, W) to the last map (B, C4, H / 32, W / 32), rounded up."""
        return self.encode(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map the last map to logits (B, num_classes), or to the features (B, C4) that `head` takes."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def _rebuilt(self) -> 'MogaNet':
        return MogaNet(self.arch, self.in_channels, self.num_classes)


class MogaNetBackbone(DenseBackbone, MogaNetTrunk):
    """The dense-prediction backbone: the normed maps of the stages, at strides 4, 8, 16 and 32.

    It has no classifier, and only the stages that `out_indices` needs: every parameter gets a gradient.

    Args:
        arch: 'xt', 't', 's', 'b', 'l', 'xl', a dict of the fields of `overlock.MogaArch`, or one.
        in_channels: Channels of the image.
        out_indices: Which of the four outputs to return, in ascending order.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and stages 1 to k with their norms, as for OverLoCK.
        norm_eval: Whether all BatchNorms stay in evaluation mode while training.
        norm_cfg: Settings of all BatchNorms in mmcv's form, see `overlock.models.dense.set_norms`.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory, see
            `Network.set_grad_checkpointing`.
        deploy: Whether to build the folded form of `switch_to_deploy`.

    Attributes:
        out_channels: Channels of the outputs, in the order of `out_indices`.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] | MogaArch = 'xt',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        drop_path_rate: float = 0.0,
        with_cp: bool | Sequence[int] = False,
        deploy: bool = False,
    ) -> None:
        indices = check_out_indices(out_indices)
        super().__init__(arch, in_channels, indices[-1] + 1, drop_path_rate, with_cp)
        self.out_indices = indices
        self.out_channels = tuple(self.arch.embed_dims[i] for i in indices)
        self.init_parameters()
        set_norms(self, norm_cfg or {})
        self.norm_cfg = dict(norm_cfg or {})
        if deploy:
            self.switch_to_deploy()
        self.freeze(frozen_stages, norm_eval)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map an image (B, C, H, W) to the outputs (B, C_i, H / 2^(i+2), W / 2^(i+2)), rounded up.

        Raises:
            ValueError: If the image is smaller than 32x32.
        """
        outs = self.encode(x)
        # mmcv's RoIAlign reads memory as contiguous, whatever the format.
        return tuple(outs[i].contiguous() for i in self.out_indices)

    def freezable_stages(self) -> list[list[nn.Module]]:
        """Return the modules of the stem, and of each stage that is built."""
        (stem, *first), *later = (list(stage) for stage in self.stages())
        return [[stem], first, *later]

    def _rebuilt(self) -> 'MogaNetBackbone':
        return MogaNetBackbone(self.arch, self.in_channels, self.out_indices, norm_cfg=self.norm_cfg)

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of each parameter as the authors number them; two blocks of stage 3 share a number.

        It is ConvNeXt's rule with stages counted from 1: 0 for the stem, up to 12 for stage 4, 13 for the norms of the
        stages. Nothing has depth 1.
        """
        ids = {}
        for name, _ in self.named_parameters():
            module, _, rest = name.partition('.')
            ids[name] = min(3 + int(rest.split('.')[0]) // 2, 11) if module == 'blocks3' else _LAYER_IDS.get(module, 13)
        return ids
