"""MogaNet's classifier with timm's interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from overlock.models.moganet import MogaNet
from overlock.timm.interface import TimmModel


class TimmMogaNet(TimmModel, MogaNet):
    """The ImageNet classifier with timm's interface; state dicts are those of `MogaNet`.

    It takes the arguments of `TimmModel`, and `drop_path_rate`, `with_cp` and `deploy` of `MogaNet`.
    """

    first_conv = 'patch_embed1.projection.0'
    classifiers = ('head',)
    features = ('norm1', 'norm2', 'norm3', 'norm4')
    aux_head = None

    def maps(self, x: Tensor) -> list[Tensor]:
        """Map an image (B, C, H, W) to the normed outputs at strides 4, 8, 16 and 32."""
        return self.encode(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map what `forward_features` returns to logits (B, num_classes), or to what the classifier takes."""
        x = F.dropout(self.pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the head a new classifier, or none if `num_classes` is 0, and new pooling if asked for."""
        global_pool = self.global_pool if global_pool is None else global_pool
        self.pool, self.head = self.new_classifier(self.num_features, num_classes, global_pool)
        self.head_hidden_size = self.num_features * self.pool.feat_mult()
        self.num_classes, self.global_pool = num_classes, global_pool

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
        twin.reset_classifier(self.num_classes, self.global_pool)
        return twin
