"""Make runs faster: tune models for inference and training, compile blocks, and test with backbones in bfloat16."""

from __future__ import annotations

import sys
from collections import Counter
from types import MethodType
from typing import Any, TypeVar

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmengine_overlock.amp import half_dtype, heads, to_float
from overlock import keep_freed_memory
from overlock.models.dense import DenseBackbone
from overlock.models.network import Block, Network
from overlock.ops.roi_align import roi_align
from overlock.ops.winograd import conv3x3, transform_kernel
from overlock.utils.errors import UserError

Model = TypeVar('Model', bound=nn.Module)

# Below, transforming pixels or reading the kernel takes longer than the multiplications that it saves. Of the direct
# one's processor time on one thread, 64 channels take 1.1, 96 take 0.7 to 0.8 (50x84 and 100x168 pixels); 8x8 pixels of
# 128 to 512 channels take 1.0 to 1.6, 10x10 of 256 take 0.9.
_WINOGRAD_CHANNELS, _WINOGRAD_PIXELS = 96, 100


def tune_for_inference(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Make a detector or segmenter predict faster, in place, with the same predictions up to rounding.

    - Its backbone takes the deploy form; BatchNorms of necks and heads go into their convolutions.
    - In `dtype`, backbone, neck and heads compute under autocast, with float32 outputs; RoIAlign, NMS and pasting of
      masks stay in float32.
    - On a CPU freed memory is kept. In necks and heads, maps are in channels_last, mmcv's RoIAlign gives way to
      `overlock.ops.roi_align`, and 3x3 convolutions in float32 are Winograd's: their errors are about 1e-5 of the
      largest value, and their kernels take four times the memory of the weights, beside these. Models with operators
      of mmcv that take every map for a contiguous one, such as deformable convolutions, do without all three.

    Load the weights before: the names of parameters change. The model does not train any more; tune a copy of one that
    goes on.

    Args:
        model: mmdet's or mmseg's, with its weights, on its device; wrapped for several processes or views, too.
        dtype: torch.bfloat16, or torch.float16 on a GPU; None for the model's own.

    Returns:
        The model.

    Raises:
        UserError: A dtype that the device does not compute in.
    """
    from mmcv.cnn import fuse_conv_bn

    device = next(model.parameters()).device.type
    if dtype not in (None, torch.bfloat16) and (dtype, device) != (torch.float16, 'cuda'):
        raise UserError(f'dtype must be torch.bfloat16, on a GPU also torch.float16, or None; got {dtype} on {device}.')
    model.eval()
    inner: Any = model
    while not hasattr(inner, 'backbone') and hasattr(inner, 'module'):
        inner = inner.module
    backbone = getattr(inner, 'backbone', None)
    if isinstance(backbone, Network):
        # It sets its memory format by itself.
        backbone.switch_to_deploy()
    parents = Counter(id(child) for module in inner.modules() for child in module.children())
    layers: list[Any] = [module for child in inner.children() if child is not backbone for module in child.modules()]
    for layer in layers:
        if _is_fusible(layer) and parents[id(layer.conv)] == 1:
            fuse_conv_bn(layer)
    if device == 'cpu':
        keep_freed_memory()
        for layer in layers if all(map(_takes_any_format, layers)) else ():
            if _averages_regions(layer):
                layer.forward = MethodType(_roi_align, layer)
            elif _is_plain(layer):
                layer.to(memory_format=torch.channels_last)
                if dtype is None and _suits_winograd(layer):
                    _kernel(layer)
                    layer.forward = MethodType(_winograd, layer)
    if dtype is not None:
        for part in heads(model):
            for module in part.modules():
                # Autocast would cast them again for every image.
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                    module.to(dtype)
        for part in [*heads(model), *filter(None, [backbone])]:
            _narrow(part, dtype)
    return model.requires_grad_(False)


def tune_for_training(model: nn.Module) -> None:
    """Make a detector train faster on a CPU, in place, with the same losses up to rounding.

    mmcv's RoIAlign gives way to `overlock.ops.roi_align`; so the state dict can be saved with `torch.save`, but not the
    model. On GPUs, and without RoIAlign, nothing changes.
    """
    if next(model.parameters()).device.type == 'cpu':
        for layer in filter(_averages_regions, model.modules()):
            layer.forward = MethodType(_roi_align, layer)


class TuneHook(Hook):
    """Tune the model for inference when its weights are loaded, before it is tested; in bfloat16 where `amp` is set."""

    def __init__(self, amp: bool = False) -> None:
        self.amp = amp

    def before_test(self, runner: Runner) -> None:
        """Tune the model."""
        device = next(runner.model.parameters()).device.type
        tune_for_inference(runner.model, half_dtype(device) if self.amp else None)


def _is_plain(module: nn.Module) -> bool:
    """Return whether it convolves with its weight as it is: not normalized at each call, as in ConvWS2d."""
    return (
        isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward and 'weight' in module._parameters
    )


def _is_fusible(module: Any) -> bool:
    """Return whether a ConvModule's BatchNorm only scales and shifts what its convolution gives."""
    from mmcv.cnn import ConvModule

    return (
        isinstance(module, ConvModule)
        and module.order[:2] == ('conv', 'norm')
        and _is_plain(module.conv)
        and isinstance(module.norm, _BatchNorm)
        and module.norm.affine
        and module.norm.track_running_stats
        and module.efficient_conv_bn_eval_forward is None
    )


def _averages_regions(module: Any) -> bool:
    return type(module).__module__ == 'mmcv.ops.roi_align' and module.pool_mode == 'avg'


def _takes_any_format(module: nn.Module) -> bool:
    """Return whether it takes maps in channels_last: of these, operators of mmcv give wrong values on CPUs, or fail."""
    file = type(module).__module__
    if file.startswith('mmcv.ops.'):
        return _averages_regions(module)
    # TOOD's head calls it by itself.
    return not hasattr(sys.modules.get(file), 'deform_conv2d')


def _suits_winograd(module: nn.Conv2d) -> bool:
    return (
        (module.kernel_size, module.stride, module.padding) == ((3, 3), (1, 1), (1, 1))
        and (module.dilation, module.groups, module.padding_mode) == ((1, 1), 1, 'zeros')
        and min(module.in_channels, module.out_channels) >= _WINOGRAD_CHANNELS
        and module.weight.dtype == torch.float32
        and not module.weight.is_inference()  # which do not tell that they changed
    )


def _kernel(module: Any) -> Tensor:
    """Return the transformed kernel of a convolution, anew when weights were loaded or the module was copied."""
    state = (id(module.weight), module.weight._version)
    if getattr(module, 'transformed', (None,))[0] != state:
        module.transformed = state, transform_kernel(module.weight.detach())
    return module.transformed[1]


def _winograd(module: Any, x: Tensor) -> Tensor:
    few = x.shape[0] * x.shape[2] * x.shape[3] < _WINOGRAD_PIXELS
    # In another dtype its errors would be many times as large.
    if few or x.dtype != torch.float32 or not x.is_cpu or torch.is_autocast_enabled('cpu'):
        return type(module).forward(module, x)
    return conv3x3(x, _kernel(module), module.bias)


def _roi_align(module: Any, x: Tensor, rois: Tensor) -> Tensor:
    out = roi_align(x, rois, module.output_size, module.spatial_scale, module.sampling_ratio, module.aligned)
    # What follows may read memory as contiguous, as operators of mmcv do.
    return out.contiguous() if x.is_contiguous() else out


def _narrow(module: nn.Module, dtype: torch.dtype) -> None:
    """Run a module under autocast to a dtype, with float32 outputs."""
    module.narrow_dtype = dtype  # type: ignore[assignment]
    module.forward = MethodType(_narrow_forward, module)


def _narrow_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(next(module.parameters()).device.type, module.narrow_dtype):
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
