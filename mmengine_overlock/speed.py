"""What makes runs faster without changing what they compute, or within the precision asked for."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.device import get_device
from torch import Tensor, nn

from mmengine_overlock.amp import half_dtype
from overlock import keep_freed_memory
from overlock.models.blocks import DynamicBlock, StaticBlock
from overlock.models.overlock import Trunk
from overlock.utils.errors import UserError


def tune_process() -> None:
    """Settings of this process that cost nothing: on CPUs, freed memory is kept for the next tensors."""
    if get_device() == 'cpu':
        keep_freed_memory()


def compile_backbones(model: nn.Module, **options: Any) -> None:
    """Compiles the blocks of every OverLoCK backbone in a model with torch.compile, in place, at their first call.

    Blocks of one stage share a graph, and one graph serves every image size: the whole network as one graph would take
    many times as long to compile. Names of parameters stay.

    Args:
        model: A detector or segmenter.
        **options: Those of torch.compile.
    """
    for backbone in _backbones(model):
        for block in backbone.modules():
            if isinstance(block, (StaticBlock, DynamicBlock)):
                block.compile(**{'dynamic': True, **options})


def narrow_backbones(model: nn.Module) -> None:
    """Runs every OverLoCK backbone in a model in bfloat16 autocast; what it gives is float32 again, for all behind it.

    On a GPU without bfloat16 it is float16. Boxes at hundreds of pixels need more than the 8 bits of bfloat16, and
    mmcv's operators have no bfloat16.
    """
    for backbone in _backbones(model):
        backbone.forward = _Narrow(backbone)


class _Narrow:
    def __init__(self, backbone: Trunk) -> None:
        self.backbone = backbone

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, half_dtype(x.device.type)):
            outs = type(self.backbone).forward(self.backbone, x)
        return tuple(out.float() for out in outs)


def _backbones(model: nn.Module) -> list[Trunk]:
    found = [module for module in model.modules() if isinstance(module, Trunk)]
    if not found:
        raise UserError('--compile and --amp work on the OverLoCK backbone, and this model has none; leave them out.')
    return found
