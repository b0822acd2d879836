"""What dense-prediction backbones share: the choice of outputs, frozen stages, settings of BatchNorms, depths."""

from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any, TypeVar

from torch import nn

from overlock.layers.fold import BatchNorm

Self = TypeVar('Self', bound='DenseBackbone')

# Whether a value suits a setting of `norm_cfg`, mmcv's convention, for the norms that published weights hold.
_NORM_SETTINGS: dict[str, Callable[[Any], bool]] = {
    'type': lambda value: value in ('BN', 'SyncBN'),
    'requires_grad': lambda value: isinstance(value, bool),
    'eps': lambda value: isinstance(value, (int, float)) and 0 < value < inf,
    'momentum': lambda value: value is None or (isinstance(value, (int, float)) and 0 <= value <= 1),
}


def check_out_indices(out_indices: Iterable[int] | int) -> tuple[int, ...]:
    """Return the indices of the outputs as a tuple.

    Raises:
        ValueError: If they are not ascending and among 0 to 3.
    """
    given = tuple(out_indices) if isinstance(out_indices, Iterable) else (out_indices,)
    indices = tuple(i for i in range(4) if i in given)
    if not indices or indices != given:
        raise ValueError(f'out_indices must be ascending and among 0 to 3, got {given}')
    return indices


def set_norms(model: nn.Module, norm_cfg: Mapping[str, Any]) -> None:
    """Give every BatchNorm of a model the settings of mmcv's `norm_cfg`, in place.

    Args:
        model: A backbone; not itself a BatchNorm.
        norm_cfg: `type` ('BN', or 'SyncBN' for one that is synchronized over processes), `requires_grad` of weight and
            bias, `eps`, `momentum`; each may be left out.

    Raises:
        ValueError: If it is no dict, or has another setting or a value that does not suit.
    """
    if not isinstance(norm_cfg, Mapping) or not all(
        name in _NORM_SETTINGS and _NORM_SETTINGS[name](value) for name, value in norm_cfg.items()
    ):
        raise ValueError(
            "norm_cfg is a dict of type ('BN' or 'SyncBN', which published weights fit), requires_grad (bool), eps "
            f'(above 0) and momentum (0 to 1, or None); got {norm_cfg!r}'
        )
    if norm_cfg.get('type') == 'SyncBN':
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eps = norm_cfg.get('eps', module.eps)
            module.momentum = norm_cfg.get('momentum', module.momentum)
            for parameter in module.parameters():
                parameter.requires_grad_(norm_cfg.get('requires_grad', parameter.requires_grad))


class DenseBackbone(nn.Module):
    """A backbone whose first stages can be frozen, and whose BatchNorms can keep their statistics.

    Attributes:
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and stages 1 to k.
        norm_eval: Whether all BatchNorms stay in evaluation mode while training.
    """

    frozen_stages: int = -1
    norm_eval: bool = False

    def freezable_stages(self) -> list[list[nn.Module]]:
        """Return the modules of the stem, and of each stage that is built."""
        raise NotImplementedError

    def layer_ids(self) -> dict[str, int]:
        """Return the depth of each parameter, for layer-wise learning-rate decay.

        0 is the stem; parameters of the highest depth learn at the full rate.
        """
        raise NotImplementedError

    def freeze(self, frozen_stages: int, norm_eval: bool) -> None:
        """Freeze stages: no gradients, evaluation mode, now and after every call of `train`.

        Raises:
            ValueError: If `frozen_stages` is not between -1 and 4.
        """
        if frozen_stages not in range(-1, 5):
            raise ValueError(f'frozen_stages must be between -1 and 4, got {frozen_stages}')
        self.frozen_stages, self.norm_eval = int(frozen_stages), norm_eval
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for modules in self.freezable_stages()[: self.frozen_stages + 1]:
            for module in modules:
                module.eval().requires_grad_(False)

    def train(self: Self, mode: bool = True) -> Self:
        """Set the mode; frozen modules, and under `norm_eval` every BatchNorm, stay in evaluation."""
        super().train(mode)
        self._keep_frozen()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self
