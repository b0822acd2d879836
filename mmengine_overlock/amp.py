"""Training in mixed precision: bfloat16 where the device has it, else float16 with a dynamic loss scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import autocast
from torch import nn

from overlock.utils.errors import UserError


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Optimizer wrapper for training in bfloat16 on CUDA devices and CPUs; mmengine's AmpOptimWrapper refuses CPUs.

    bfloat16 has the range of float32 and needs no loss scale. The outputs of necks and detection heads become float32:
    the operators of mmcv have no bfloat16, and boxes at hundreds of pixels need more than its 8 bits. Segmentation
    heads, whose forward hooks mmseg does not run, keep bfloat16 logits; autocast computes their losses in float32.
    """

    _outputs_are_float = False

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        if not self._outputs_are_float:
            for module in heads(model):
                module.register_forward_hook(lambda module, inputs, outputs: to_float(outputs))
            self._outputs_are_float = True
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def heads(model: nn.Module) -> list[nn.Module]:
    """Return the necks and heads of a model, those inside of others too."""
    # The heads of a cascade are numbered: `bbox_head.0`.
    return [module for name, module in model.named_modules() if name.rstrip('.0123456789').endswith(('neck', '_head'))]


def to_float(outputs: Any) -> Any:
    """Return tensors of floating point, in lists and tuples too, in float32."""
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(to_float(item) for item in outputs)
    return outputs.float() if isinstance(outputs, torch.Tensor) and outputs.is_floating_point() else outputs


def half_dtype(device: str) -> torch.dtype:
    """Return bfloat16 where this kind of device computes in it without emulation, else float16."""
    lacks = device == 'cuda' and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if lacks else torch.bfloat16


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision.

    Args:
        cfg: Changed in place: `optim_wrapper`.

    Raises:
        UserError: The configuration has an optimizer wrapper without mixed precision other than OptimWrapper.
    """
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind in ('AmpOptimWrapper', 'BFloat16OptimWrapper'):
        return
    if kind != 'OptimWrapper':
        raise UserError(
            f'--amp works with the optimizer wrapper OptimWrapper, got {kind}; '
            'set mixed precision in the configuration.'
        )
    if half_dtype(get_device()) == torch.float16:
        wrapper.update(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')
    else:
        wrapper['type'] = 'BFloat16OptimWrapper'
