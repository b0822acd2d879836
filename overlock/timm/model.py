"""The classifier with timm's interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import ConvNorm
from overlock.models.overlock import OverLoCK
from overlock.timm.interface import TimmModel


class TimmOverLoCK(TimmModel, OverLoCK):
    """The ImageNet classifier with timm's interface.

    State dicts are those of `OverLoCK`; entries for an auxiliary head that the model lacks are ignored.

    Args:
        *args: See `TimmModel`.
        aux_head: Whether Overview-Net has a classifier of its own: in training the output then is a dict with `main`
            and `aux` logits.
        **kwargs: See `TimmModel`; also `drop_path_rate`, `with_cp`, `deploy` and `contmix_backend` of `OverLoCK`.
    """

    first_conv = 'base_net.stem.0.conv'
    classifiers = ('head.fc', 'aux_head.fc')
    features = ('base_net.stage1', 'base_net.stage2', 'focus_net.stage3', 'focus_net.stage4')

    def __init__(self, *args: Any, aux_head: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, aux_head=aux_head, **kwargs)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map what `forward_features` returns to logits (B, num_classes), or to what the classifier takes."""
        x = self.head.pool(self.head.proj(x))
        x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.head.fc(x)
        return x.flatten(1) if self.global_pool else x

    def maps(self, x: Tensor) -> list[Tensor]:
        """Map an image (B, C, H, W) to the raw outputs at strides 4, 8, 16 and 32, the last two with their context."""
        return self.encode(x)[0]

    def remove_head(self) -> None:
        """Remove all behind the last output, and the auxiliary head, in place."""
        self.head.proj = nn.Identity().train(self.training)
        self.aux_head = None
        super().remove_head()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the heads new classifiers, or none if `num_classes` is 0, and new pooling if asked for."""
        global_pool = self.global_pool if global_pool is None else global_pool
        proj = self.head.proj
        width = proj.conv.out_channels if isinstance(proj, ConvNorm) else self.num_features
        pool, self.head.fc = self.new_classifier(width, num_classes, global_pool, use_conv=True)
        self.head.pool, self.head_hidden_size = pool, width * pool.feat_mult()
        self.num_classes, self.global_pool = num_classes, global_pool
        if self.aux_head is not None:
            _, self.aux_head.fc = self.new_classifier(self.arch.embed_dims[3], num_classes, 'avg', use_conv=True)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth, a group for each block (`coarse`: each stage), the heads last."""
        groups: dict[str, Any] = {'stem': r'^base_net\.stem\.'}
        for stage, entries in self.layers_before.items():
            entry = '|'.join(entries)
            groups[stage] = (
                rf'^(?:{entry}|{stage})\.' if coarse else [(rf'^(?:{entry})\.', (0,)), (rf'^{stage}\.(\d+)\.', None)]
            )
        return groups

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.aux_head is None:
            for name in [name for name in state_dict if name.startswith(f'{prefix}aux_head.')]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _rebuilt(self) -> TimmOverLoCK:
        twin = TimmOverLoCK(self.arch, self.in_chans, 0, aux_head=self.aux_head is not None)
        twin.prune_intermediate_layers([self.num_outputs - 1], prune_head=isinstance(self.head.proj, nn.Identity))
        twin.reset_classifier(self.num_classes, self.global_pool)
        return twin
