"""The classifier with timm's interface."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.layers import ConvNorm
from overlock.models.arch import Arch
from overlock.models.overlock import OverLoCK
from overlock.timm.interface import TimmModel

_FEATURES = ('base_net.stage1', 'base_net.stage2', 'focus_net.stage3', 'focus_net.stage4')


class TimmOverLoCK(TimmModel, OverLoCK):
    """The ImageNet classifier with timm's interface.

    State dicts are those of `OverLoCK`; entries for an auxiliary head that the model lacks are ignored.

    Args:
        arch: See `OverLoCK`.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for the pooled features in front of the classifier.
        global_pool: Pooling of `timm.layers.SelectAdaptivePool2d`; '' for none.
        drop_rate: Dropout in front of the classifier.
        aux_head: Whether Overview-Net has a classifier of its own: in training the output then is a dict with `main`
            and `aux` logits.
        **kwargs: `drop_path_rate`, `with_cp`, `deploy` and `contmix_backend` of `OverLoCK`.
    """

    first_conv = 'base_net.stem.0.conv'
    classifiers = ('head.fc', 'aux_head.fc')

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch = 'xt',
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        aux_head: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(arch, in_chans, max(num_classes, 1), aux_head, **kwargs)
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = self.arch.out_channels[3]
        self.feature_info = [
            {'num_chs': channels, 'reduction': 4 * 2**i, 'module': module}
            for i, (channels, module) in enumerate(zip(self.arch.out_channels, _FEATURES, strict=True))
        ]
        self.to(dtype=dtype)
        self.reset_classifier(num_classes, global_pool)

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

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all that the outputs `indices` do not need, in place, and return them counted from the first.

        The head stays if the last output does and `prune_head` is False; `prune_norm` has no effect.
        """
        take_indices, last = feature_take_indices(self.num_outputs, indices)
        head = prune_head or last + 1 < self.num_outputs
        self.shorten(last + 1)
        if head:
            self.num_features = self.arch.out_channels[last]
            self.head.proj = nn.Identity().train(self.training)
            self.aux_head = None
            self.reset_classifier(0, '')
        return take_indices

    def get_classifier(self) -> nn.Module:
        """Return the last layer of the head."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the heads new classifiers, or none if `num_classes` is 0, and new pooling if asked for."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        proj = self.head.proj
        width = proj.conv.out_channels if isinstance(proj, ConvNorm) else self.num_features
        pool, self.head.fc = self._new_classifier(width, self.global_pool)
        self.head.pool, self.head_hidden_size = pool, width * pool.feat_mult()
        if self.aux_head is not None:
            _, self.aux_head.fc = self._new_classifier(self.arch.embed_dims[3], 'avg')

    def _new_classifier(self, channels: int, pool_type: str) -> tuple[SelectAdaptivePool2d, nn.Module]:
        like = next(self.parameters())
        pool, fc = create_classifier(channels, self.num_classes, pool_type, use_conv=True)
        if isinstance(fc, nn.Conv2d) and fc.bias is not None:
            nn.init.trunc_normal_(fc.weight, std=0.02)
            nn.init.zeros_(fc.bias)
        return pool.train(self.training), fc.to(like.device, like.dtype).train(self.training)

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
