"""What the classifiers with timm's interface share: their settings, intermediate maps, new classifiers, weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models import adapt_input_conv
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from overlock.checkpoint import load, load_state_dict
from overlock.checkpoint.fitting import compare_weights
from overlock.models.arch import Arch
from overlock.models.moganet import MogaArch
from overlock.models.network import Network
from overlock.utils.errors import UserError

_logger = logging.getLogger(__name__)


class TimmModel(Network):
    """The part of timm's interface that both networks share; it stands before the network in a class's bases.

    Args:
        arch: See the network.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for the pooled features in front of the classifier.
        global_pool: Pooling of `timm.layers.SelectAdaptivePool2d`; '' for none.
        drop_rate: Dropout in front of the classifier.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: Other arguments of the network.

    Attributes:
        first_conv: The module that takes the image.
        classifiers: The last modules of the heads.
        features: The modules that the four outputs come from.
        feature_info: Channels, stride and module of each of the four outputs.
        num_outputs: How many outputs the network has.
        num_features: Channels of what `forward_features` returns.
        head_hidden_size: Channels in front of the classifier.
    """

    first_conv: str
    classifiers: tuple[str, ...]
    features: tuple[str, ...]
    arch: Any
    num_classes: int
    global_pool: str
    num_outputs: int
    head_hidden_size: int

    def __init__(
        self,
        arch: str | Mapping[str, Any] | Arch | MogaArch = 'xt',
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(arch, in_chans, num_classes=max(num_classes, 1), **kwargs)
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.arch.out_channels[3]
        self.feature_info = [
            {'num_chs': channels, 'reduction': 4 * 2**i, 'module': module}
            for i, (channels, module) in enumerate(zip(self.arch.out_channels, self.features, strict=True))
        ]
        self.to(dtype=dtype)
        self.reset_classifier(num_classes, global_pool)

    def maps(self, x: Tensor) -> list[Tensor]:
        """Map an image (B, C, H, W) to the outputs at strides 4, 8, 16 and 32."""
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the outputs at strides 4, 8, 16 and 32, those of OverLoCK raw and those of MogaNet normed.

        `norm` and `stop_early` have no effect: the classifiers have no other norms, and `prune_intermediate_layers`
        leaves out what is not needed.

        Args:
            x: Image (B, C, H, W).
            indices: Which outputs; the last ones where it is a number, all where it is None.
            intermediates_only: Whether to leave out the output of `forward_features`.

        Returns:
            The output of `forward_features` and the list of outputs, or that list alone.
        """
        if output_fmt != 'NCHW':
            raise UserError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, _ = feature_take_indices(self.num_outputs, indices)
        outs = self.maps(x)
        intermediates = [outs[i] for i in take_indices]
        return intermediates if intermediates_only else (outs[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all that the outputs `indices` do not need, in place, and return them counted from the first.

        Args:
            indices: See `forward_intermediates`.
            prune_norm: Has no effect.
            prune_head: Whether to remove the head even if the last output stays.
        """
        take_indices, last = feature_take_indices(self.num_outputs, indices)
        head = prune_head or last + 1 < self.num_outputs
        self.shorten(last + 1)
        if head:
            self.num_features = self.arch.out_channels[last]
            self.remove_head()
        return take_indices

    def remove_head(self) -> None:
        """Remove all behind the last output, in place."""
        self.reset_classifier(0, '')

    def get_classifier(self) -> nn.Module:
        """Return the last layer of the head."""
        return self.get_submodule(self.classifiers[0])

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the heads new classifiers, or none if `num_classes` is 0, and new pooling if asked for."""
        raise NotImplementedError

    def new_classifier(
        self, channels: int, num_classes: int, pool_type: str, use_conv: bool = False
    ) -> tuple[SelectAdaptivePool2d, nn.Module]:
        """Return pooling and classifier in the place, dtype and mode of the model.

        Raises:
            UserError: If a linear classifier is to take a map.
        """
        if num_classes > 0 and not (pool_type or use_conv):
            raise UserError(
                f"the classifier takes pooled features: expected global_pool such as 'avg', got '' with {num_classes} "
                'classes; give num_classes=0 for the map itself'
            )
        like = next(self.parameters())
        pool, fc = create_classifier(channels, num_classes, pool_type, use_conv=use_conv)
        if isinstance(fc, (nn.Conv2d, nn.Linear)) and fc.bias is not None:
            nn.init.trunc_normal_(fc.weight, std=0.02)
            nn.init.zeros_(fc.bias)
        return pool.train(self.training), fc.to(like.device, like.dtype).train(self.training)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict as torch does.

        Raises:
            CheckpointError: If it holds integers, NaN or infinity for weights.
        """
        compare_weights(self, state_dict).require_numbers()
        return super().load_state_dict(state_dict, strict, assign)

    def load_pretrained(self, checkpoint_path: str) -> None:
        """Load a weight file of any form, adapted to the channels and classes of the model; timm calls this for files.

        For images of other than three channels timm combines the weights of the first convolution. Classifiers stay as
        they are if the model has other classes than `pretrained_cfg` says of the file.

        Args:
            checkpoint_path: A name of published weights, a path, or a URL.

        Raises:
            CheckpointError: If the file cannot be found or read, or is not of this model; nothing is loaded then.
        """
        given = self.to_own_names(load(checkpoint_path))
        stem = given.get(f'{self.first_conv}.weight')
        if stem is not None and stem.shape[1] == 3 != self.in_chans:
            given[f'{self.first_conv}.weight'] = adapt_input_conv(self.in_chans, stem)
        kept = {}
        if self.num_classes != getattr(self, 'pretrained_cfg', {}).get('num_classes', 1000):
            starts = tuple(f'{classifier}.' for classifier in self.classifiers)
            kept = {name: value for name, value in self.state_dict().items() if name.startswith(starts)}
        report = load_state_dict(self, {**given, **kept}, checkpoint_path)
        _logger.info(
            '%s',
            replace(report, loaded=tuple(name for name in report.loaded if name not in kept), new=(*report.new, *kept)),
        )
