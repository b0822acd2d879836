"""What the classifiers with timm's interface share: intermediate maps, and weights adapted to channels and classes."""

from __future__ import annotations

import logging
from dataclasses import replace

from timm.models import adapt_input_conv
from timm.models._features import feature_take_indices
from torch import Tensor

from overlock.checkpoint import load, load_state_dict
from overlock.models.network import Network
from overlock.utils.errors import UserError

_logger = logging.getLogger(__name__)


class TimmModel(Network):
    """The part of timm's interface that does not depend on the network; it stands before it in a class's bases.

    Attributes:
        first_conv: The module that takes the image.
        classifiers: The last modules of the heads.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for no classifier.
        num_outputs: How many outputs the network has.
    """

    first_conv: str
    classifiers: tuple[str, ...]
    in_chans: int
    num_classes: int
    num_outputs: int

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
