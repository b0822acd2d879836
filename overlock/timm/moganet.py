"""MogaNet's classifier with timm's interface."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.layers import create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.models.moganet import MogaArch, MogaNet
from overlock.timm.interface import TimmModel


class TimmMogaNet(TimmModel, MogaNet):
    """The ImageNet classifier with timm's interface; state dicts are those of `MogaNet`.

    Args:
        arch: See `MogaNet`.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for the pooled features in front of the classifier.
        global_pool: Pooling of `timm.layers.SelectAdaptivePool2d`; '' for none.
        drop_rate: Dropout in front of the classifier.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: `drop_path_rate`, `with_cp` and `deploy` of `MogaNet`.

    Attributes:
        num_features: Channels of what `forward_features` returns.
        head_hidden_size: Channels in front of the classifier.
        feature_info: Channels, stride and module of each of the four outputs.
    """

    first_conv = 'patch_embed1.projection.0'
    classifiers = ('head',)
    aux_head = None

    def __init__(
        self,
        arch: str | Mapping[str, Any] | MogaArch = 'xt',
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(arch, in_chans, max(num_classes, 1), **kwargs)
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.drop_rate = drop_rate
        self.num_features = self.arch.embed_dims[3]
        self.feature_info = [
            {'num_chs': channels, 'reduction': 4 * 2**i, 'module': f'norm{i + 1}'}
            for i, channels in enumerate(self.arch.embed_dims)
        ]
        self.to(dtype=dtype)
        self.reset_classifier(num_classes, global_pool)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Map an image (B, C, H, W) to the normed outputs at strides 4, 8, 16 and 32."""
        return self.encode(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map what `forward_features` returns to logits (B, num_classes), or to what the classifier takes."""
        x = F.dropout(self.pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all that the outputs `indices` do not need, in place, and return them counted from the first.

        Args:
            indices: See `forward_intermediates`.
            prune_norm: Has no effect: the norms are on the main path.
            prune_head: Whether to remove the head even if the last output stays.
        """
        take_indices, last = feature_take_indices(self.num_outputs, indices)
        head = prune_head or last + 1 < self.num_outputs
        self.shorten(last + 1)
        if head:
            self.num_features = self.arch.embed_dims[last]
            self.reset_classifier(0, '')
        return take_indices

    def get_classifier(self) -> nn.Module:
        """Return the last layer of the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the head a new classifier, or none if `num_classes` is 0, and new pooling if asked for."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        like = next(self.parameters())
        self.pool, head = create_classifier(self.num_features, num_classes, self.global_pool)
        if isinstance(head, nn.Linear):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head_hidden_size = self.num_features * self.pool.feat_mult()
        self.head = head.to(like.device, like.dtype)
        self.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth, a group for each block (`coarse`: each stage), the head last."""
        groups: dict[str, Any] = {'stem': r'^patch_embed1\.'}
        for i in range(1, self.num_outputs + 1):
            groups[f'blocks{i}'] = (
                rf'^(?:patch_embed|blocks|norm){i}\.'
                if coarse
                else [(rf'^patch_embed{i}\.', (0,)), (rf'^blocks{i}\.(\d+)\.', None)]
            )
        return groups

    def _rebuilt(self) -> TimmMogaNet:
        twin = TimmMogaNet(self.arch, self.in_chans, 0)
        twin.prune_intermediate_layers([self.num_outputs - 1], prune_head=False)
        twin.num_features = self.num_features
        twin.reset_classifier(self.num_classes, self.global_pool)
        return twin
