"""Layer-wise learning-rate decay by the depth of the backbone's parameters."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from overlock.models.dense import DenseBackbone
from overlock.utils.errors import UserError


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Give each depth of the backbone its own learning rate, and biases and vectors no weight decay.

    In a configuration: `optim_wrapper = dict(constructor='LayerDecayOptimWrapperConstructor', optimizer=...,
    paramwise_cfg=dict(decay_rate=0.8))`. The rate of the optimizer is that of the heads and of the deepest parameters
    of the backbone; each step towards the stem multiplies it by `decay_rate`. The backbone numbers its depths itself
    (`layer_ids`). The constructors of mmdet and mmseg do the same for ConvNeXt alone, and decay scales of channels
    (1, C, 1, 1), which count as vectors here, as they did for the published weights.

    Raises:
        UserError: If `paramwise_cfg` is something else, the optimizer has no `lr`, or the model has no backbone that
            numbers its depths.
    """

    def _validate_cfg(self) -> None:
        if self.base_lr is None:
            raise UserError(f'{type(self).__name__} needs the learning rate; give the optimizer an lr')
        # mmengine leaves `_delete_` where there is nothing to replace.
        given = {name: value for name, value in dict(self.paramwise_cfg).items() if name != '_delete_'}
        rate = given.get('decay_rate')
        if set(given) != {'decay_rate'} or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise UserError(
                f'paramwise_cfg of {type(self).__name__} takes decay_rate, above 0 and at most 1, and nothing else; '
                f'got {given}; add _delete_=True to it to replace inherited settings'
            )

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Add a group for each learning rate and weight decay of the parameters of `module` that are not frozen."""
        steps: dict[str, int] = {}
        for path, backbone in module.named_modules():
            if isinstance(backbone, DenseBackbone):
                ids = backbone.layer_ids()
                steps |= {f'{path}.{name}'.lstrip('.'): max(ids.values()) - depth for name, depth in ids.items()}
        if not steps:
            raise UserError(
                f'{type(self).__name__} needs a backbone that numbers its depths, OverLoCK or MogaNet, and '
                f'{type(module).__name__} has none; leave `constructor` out of optim_wrapper'
            )
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            step, decays = steps.get(name, 0), parameter.squeeze().ndim > 1 and not name.endswith('.bias')
            group = groups.setdefault(
                (step, decays), {'params': [], 'lr': self.base_lr * self.paramwise_cfg['decay_rate'] ** step}
            )
            group['params'].append(parameter)
            if not decays:
                group['weight_decay'] = 0.0
        params.extend(groups.values())
