"""Make runs faster: tune models for inference, compile blocks, and test with backbones in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any, TypeVar

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmengine_overlock.amp import half_dtype, heads, to_float
from overlock import keep_freed_memory
from overlock.models.dense import DenseBackbone
from overlock.models.network import Block, Network
from overlock.ops.roi_align import roi_align
from overlock.ops.winograd import conv3x3, transform_kernel
from overlock.utils.errors import UserError

Model = TypeVar('Model', bound=nn.Module)

# Below, transforming the pixels takes longer than the multiplications that it saves.
_WINOGRAD_CHANNELS = 64


def tune_for_inference(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Make a detector or segmenter predict faster, in place, with the same predictions up to rounding.

    - Its backbone takes the deploy form; BatchNorms of necks and heads go into their convolutions.
    - In `dtype`, backbone, neck and heads compute under autocast, with float32 outputs; RoIAlign, NMS and pasting of
      masks stay in float32.
    - On a CPU, maps are in channels_last, freed memory is kept, mmcv's RoIAlign gives way to `overlock.ops.roi_align`,
      and 3x3 convolutions in float32 are Winograd's.

    Load the weights before: the names of parameters change. It does not train any more.

    Args:
        model: mmdet's or mmseg's, with its weights, on its device.
        dtype: torch.bfloat16, or torch.float16 on a GPU; None for the model's own.

    Returns:
        The model.

    Raises:
        UserError: A dtype that the device does not compute in.
    """
    from mmcv.cnn import ConvModule, fuse_conv_bn

    device = next(model.parameters()).device.type
    if dtype not in (None, torch.bfloat16) and (dtype, device) != (torch.float16, 'cuda'):
        raise UserError(f'dtype must be torch.bfloat16, on a GPU also torch.float16, or None; got {dtype} on {device}.')
    model.eval()
    for name, child in model.named_children():
        if name != 'backbone':
            for module in child.modules():
                if isinstance(module, ConvModule) and module.order[:2] == ('conv', 'norm'):
                    fuse_conv_bn(module)
            if device == 'cpu':
                child.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        elif isinstance(child, Network):
            # It sets its memory format by itself.
            child.switch_to_deploy()
    if device == 'cpu':
        keep_freed_memory()
        layers: list[Any] = list(model.modules())
        for layer in layers:
            if type(layer).__name__ == 'RoIAlign' and layer.pool_mode == 'avg':
                layer.forward = MethodType(_roi_align, layer)
            elif dtype is None and _suits_winograd(layer):
                layer.register_buffer('kernel', transform_kernel(layer.weight), persistent=False)
                layer.forward = MethodType(_winograd, layer)
    if dtype is not None:
        for part in heads(model):
            for module in part.modules():
                # Autocast would cast them again for every image.
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                    module.to(dtype)
        for part in [*heads(model), *filter(None, [getattr(model, 'backbone', None)])]:
            _narrow(part, dtype)
    return model.requires_grad_(False)


class TuneHook(Hook):
    """Tune the model for inference when its weights are loaded, before it is tested; in bfloat16 where `amp` is set."""

    def __init__(self, amp: bool = False) -> None:
        self.amp = amp

    def before_test(self, runner: Runner) -> None:
        """Tune the model, behind wrappers for several processes or views of an image."""
        model: Any = runner.model
        while not hasattr(model, 'backbone') and hasattr(model, 'module'):
            model = model.module
        device = next(model.parameters()).device.type
        tune_for_inference(model, half_dtype(device) if self.amp else None)


def _suits_winograd(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and type(module).forward is nn.Conv2d.forward
        and (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, 'zeros')
        and min(module.in_channels, module.out_channels) >= _WINOGRAD_CHANNELS
        and module.weight.dtype == torch.float32
    )


def _winograd(module: Any, x: Tensor) -> Tensor:
    return conv3x3(x, module.kernel, module.bias)


def _roi_align(module: Any, x: Tensor, rois: Tensor) -> Tensor:
    return roi_align(x, rois, module.output_size, module.spatial_scale, module.sampling_ratio, module.aligned)


def _narrow(module: nn.Module, dtype: torch.dtype) -> None:
    """Run a module under autocast to a dtype, with float32 outputs."""
    module.narrow_dtype = dtype  # type: ignore[assignment]
    module.forward = MethodType(_narrow_forward, module)


def _narrow_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    x = args[0][0] if isinstance(args[0], Sequence) else args[0]
    with torch.autocast(x.device.type, module.narrow_dtype):
        return to_float(type(module).forward(module, *args, **kwargs))


def compile_backbones(model: nn.Module, **options: Any) -> None:
    """Compile the blocks of every backbone of ours in a model with torch.compile, in place, at their first call.

    Blocks of one stage share a graph, and one graph serves every image size: the whole network as one graph would take
    many times as long to compile. The names of parameters stay. Inference on a CPU does not gain: the folded XT
    at 512x512 took 0.48 s compiled and 0.34 s as it is (one run on a busy machine).

    Args:
        model: A detector or segmenter.
        **options: Those of torch.compile.

    Raises:
        UserError: The model has none.
    """
    for backbone in _backbones(model):
        for block in backbone.modules():
            if isinstance(block, Block):
                block.compile(**{'dynamic': True, **options})


def narrow_backbones(model: nn.Module) -> None:
    """Run every backbone of ours in a model in bfloat16 autocast, with float32 outputs.

    On a GPU without bfloat16 it is float16. Boxes at hundreds of pixels need more than the 8 bits of bfloat16, and
    mmcv's operators have no bfloat16.

    Raises:
        UserError: The model has none.
    """
    for backbone in _backbones(model):
        _narrow(backbone, half_dtype(next(backbone.parameters()).device.type))


def _backbones(model: nn.Module) -> list[DenseBackbone]:
    found = [module for module in model.modules() if isinstance(module, DenseBackbone)]
    if not found:
        raise UserError(
            '--compile and --amp work on the backbones OverLoCK and MogaNet, and this model has none; leave them out.'
        )
    return found
