"""The dense-prediction backbone."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from overlock.layers import ChannelAffine, LayerNorm2d, PointwiseConv
from overlock.layers.fold import fold_into_previous
from overlock.models.arch import Arch
from overlock.models.dense import DenseBackbone, check_out_indices
from overlock.models.overlock import Trunk


class OverLoCKBackbone(DenseBackbone, Trunk):
    """The dense-prediction backbone: four maps at strides 4, 8, 16 and 32.

    It has no classifier and no auxiliary head, and only the nets that `out_indices` needs: every parameter gets a
    gradient.

    Args:
        arch: 'xt', 't', 's', 'b', a dict of the fields of `overlock.Arch`, or one.
        in_channels: Channels of the image.
        out_indices: Which of the four outputs to return, in ascending order.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and stages 1 to k (stages 1 to 3 are Base-Net's,
            stage 4 is Overview-Net); Focus-Net is never frozen.
        norm_eval: Whether all BatchNorms stay in evaluation mode while training.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        with_cp: Whether blocks recompute their activations in the backward pass to save memory, see
            `Network.set_grad_checkpointing`.
        deploy: Whether to build the folded form of `switch_to_deploy`.
        overview_residual: Whether the normed and projected overview is added to the last output: on for detection,
            off for segmentation. Published checkpoints of each load only into their own form.
        contmix_backend: Backend of `overlock.ops.contmix`.

    Attributes:
        out_channels: Channels of the outputs, in the order of `out_indices`.
    """

    output_norms: dict[str, LayerNorm2d]  # nn.ModuleDict does not tell the type of its values

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch = 'xt',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        drop_path_rate: float = 0.0,
        with_cp: bool | Sequence[int] = False,
        deploy: bool = False,
        overview_residual: bool = True,
        contmix_backend: str = 'auto',
    ) -> None:
        indices = check_out_indices(out_indices)
        super().__init__(arch, in_channels, indices[-1] + 1, drop_path_rate, with_cp, contmix_backend)
        self.out_indices = indices
        channels = self.arch.out_channels
        self.out_channels = tuple(channels[i] for i in indices)
        # Stage 3 takes the normed second output: build this norm even if the output is not returned.
        normed = sorted({*indices, 1}) if indices[-1] > 1 else indices
        self.output_norms = nn.ModuleDict({f'out{i}': LayerNorm2d(channels[i]) for i in normed})  # type: ignore[assignment]
        self.overview_residual = overview_residual and 3 in indices
        if self.overview_residual:
            self.output_norms['overview'] = LayerNorm2d(self.arch.embed_dims[3])
            self.overview_proj = PointwiseConv(self.arch.embed_dims[3], channels[3])
            self.overview_scale: ChannelAffine | nn.Identity = ChannelAffine(channels[3], init_value=1e-5)
        self.init_parameters()
        if deploy:
            self.switch_to_deploy()
        self.freeze(frozen_stages, norm_eval)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map an image (B, C, H, W) to the outputs (B, C_i, H / 2^(i+2), W / 2^(i+2)), rounded up."""
        outs, overview = self.encode(x, self.output_norms['out1'] if self.num_outputs > 1 else None)
        normed = []
        for i in self.out_indices:
            out = outs[i] if i == 1 else self.output_norms[f'out{i}'](outs[i])
            if i == 3 and self.overview_residual:
                out = out + self.overview_scale(self.overview_proj(self.output_norms['overview'](overview)))
            # mmcv's RoIAlign reads memory as contiguous, whatever the format.
            normed.append(out.contiguous())
        return tuple(normed)

    def switch_to_deploy(self) -> 'OverLoCKBackbone':
        """Fold all linear steps for inference, as `Foldable.switch_to_deploy` does."""
        super().switch_to_deploy()
        if self.overview_residual and not isinstance(self.overview_scale, nn.Identity):
            self.output_norms['overview'].fold_affine_into(self.overview_proj)
            fold_into_previous(self.overview_proj, self.overview_scale.weight.flatten(), self.overview_scale.bias)
            self.overview_scale = nn.Identity()
        return self

    def _rebuilt(self) -> 'OverLoCKBackbone':
        return OverLoCKBackbone(self.arch, self.in_channels, self.out_indices, overview_residual=self.overview_residual)

    def freezable_stages(self) -> list[list[nn.Module]]:
        """Return the modules of the stem, of the stages of Base-Net, and of Overview-Net."""
        base = self.base_net
        stages: list[list[nn.Module]] = [[base.stem], [base.stage1]]
        if self.num_outputs > 1:
            stages.append([base.downsample2, base.stage2])
        if self.num_outputs > 2:
            stages += [[base.downsample3, base.stage3], [self.overview_net]]
        return stages

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of each parameter: 0 for the stem, one more for each block, most for what follows them.

        A layer between stages has the depth of the block after it.
        """
        modules = dict(self.named_modules())
        depths: list[list[nn.Module]] = [[self.base_net.stem]]
        for stage, layers in self.layers_before.items():
            before = [modules[layer] for layer in layers if stage in modules]
            for block in modules.get(stage, ()):
                depths.append([*before, block])
                before = []
        ids = {p: depth for depth, parts in enumerate(depths) for module in parts for p in module.parameters()}
        return {name: ids.get(parameter, len(depths)) for name, parameter in self.named_parameters()}
