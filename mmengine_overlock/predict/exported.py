"""Run ONNX files of `overlock export` in the place of mmdet's and mmseg's models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmcv.transforms import Resize
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F

from mmengine_overlock.embedded import strangers
from mmengine_overlock.predict.network import Network
from overlock.utils.errors import UserError


def open_exported(path: Path, device: str | torch.device | None, tile: int | None = None) -> Network:
    """Open an exported file in onnxruntime; see `Predictor`.

    Raises:
        UserError: It is no such file, cannot run on the device, or does not fit the tiles.
    """
    exported = _open(path, device)
    info, size, detector = exported.info, exported.size, exported.info['task'] == 'detector'
    scope = 'mmdet' if detector else 'mmseg'
    import_module(scope)
    if tile and not detector and size and tile > min(size):
        raise UserError(
            f'{path} takes images of {size[0]}x{size[1]}: tiles can have at most {min(size)} pixels a side, got {tile}.'
        )
    pack: dict[str, Any] = dict(type='PackSegInputs')
    if detector:
        pack = dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor'))
    steps = [ResizeInside(size)] if size else _steps(info)
    pipeline = [dict(type='LoadImageFromNDArray'), *steps, pack]
    with DefaultScope.overwrite_default_scope(scope):
        model = make_model(exported)
    return Network(model, scope, pipeline, tuple(info.get('classes', ())), info.get('palette'))


def open_session(path: Path, providers: Sequence[Any] = ('CPUExecutionProvider',)) -> Any:
    """Return an `onnxruntime.InferenceSession` that is silent and has as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=list(providers))


def _open(path: Path, device: str | torch.device | None) -> Exported:
    """Open a file in onnxruntime, by default on a GPU where it has one."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f'{path} needs onnxruntime; install it with `pip install onnxruntime`.') from None
    if not path.is_file():
        raise UserError(f'The model {path} does not exist; give a file that `overlock export` wrote.')
    cuda, present = 'CUDAExecutionProvider', onnxruntime.get_available_providers()
    kind, _, index = str(device or ('cuda' if cuda in present else 'cpu')).partition(':')
    if kind not in ('cpu', 'cuda') or (kind == 'cuda' and cuda not in present):
        raise UserError(f'onnxruntime has no device {device} here, only {", ".join(present)}; give cpu.')
    providers: list[Any] = ['CPUExecutionProvider']
    if kind == 'cuda':
        providers.insert(0, (cuda, {'device_id': index or '0'}))
    try:
        session = open_session(path, providers)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(f'onnxruntime cannot open {path} ({reason}); export it again.') from None
    # It goes on without CUDA where its libraries are missing.
    if device is not None and kind == 'cuda' and cuda not in session.get_providers():
        raise UserError(
            f'onnxruntime cannot use the device {device}: it lacks libraries of CUDA or cuDNN that it needs, or there '
            'is no such GPU; mend that, or give cpu.'
        )
    info = {name: _parse(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    if info.get('task') not in ('detector', 'segmenter'):
        raise UserError(
            f'{path} must be a detector or segmenter written by `overlock export`, but its metadata says '
            f'{"it is a " + str(info["task"]) if "task" in info else "nothing"}.'
        )
    needed = ['mean', 'std', 'pad_size_divisor', 'smallest_side']
    needed += ['classes'] if info['task'] == 'segmenter' else []
    if lacking := [name for name in needed if name not in info]:
        raise UserError(f'The metadata of {path} lack {", ".join(lacking)}; export it again, with its checkpoint.')
    image = session.get_inputs()[0]
    height, width = image.shape[2:]
    size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {'image': images.numpy()})]

    return Exported(run, info, size, 'uint8' in image.type)


def _steps(info: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the transforms that bring an image to the size that the network was tested at.

    Raises:
        UserError: The file does not have them, or they are none of those in the configurations of this package.
    """
    steps = info.get('pipeline')
    if not isinstance(steps, list) or not all(isinstance(step, dict) and 'type' in step for step in steps):
        steps = None
    if steps is None or strangers(steps):
        raise UserError(f'The metadata of the model lack its test pipeline, got {steps}; export it again.')
    return [
        {name: tuple(value) if isinstance(value, list) else value for name, value in step.items()} for step in steps
    ]


@dataclass
class Exported:
    """An exported detector or segmenter.

    Attributes:
        run: Gives its outputs for images.
        info: What the file says about itself, see `mmengine_overlock.export`.
        size: Height and width of its one image, where they are fixed.
        pixels: Whether it takes pixels and normalizes them itself.
    """

    run: Callable[[Tensor], Sequence[Tensor]]
    info: dict[str, Any]
    size: tuple[int, int] | None
    pixels: bool

    def preprocessor(self, kind: str) -> dict[str, Any]:
        """Return the settings of the toolbox's data preprocessor, for what the file does not do itself."""
        settings: dict[str, Any] = dict(type=kind, bgr_to_rgb=True)
        return settings if self.pixels else settings | dict(mean=self.info['mean'], std=self.info['std'])

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Run the network on images (B, 3, H, W) of its preprocessor; those too small are padded behind their sides."""
        sides = images.shape[2:]
        divisor = 1 if self.pixels else self.info['pad_size_divisor']
        least = self.info['smallest_side']
        target = self.size or [-(-max(side, least) // divisor) * divisor for side in sides]
        images = pad_to(images, (target[0], target[1]), self.info, self.pixels).cpu()
        outs = [self.run(batch) for batch in images.split(1 if self.size else len(images))]
        return [torch.cat(parts) for parts in zip(*outs, strict=True)]


def make_model(exported: Exported) -> BaseModel:
    """Return a model with the interface of mmdet's or mmseg's, in evaluation; their scope must be the default."""
    return (Detector(exported) if exported.info['task'] == 'detector' else _make_segmenter(exported)).eval()


def fit_inside(sides: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the largest height and width of the same ratio within a size."""
    ratio = min(most / side for most, side in zip(size, sides, strict=True))
    height, width = (max(1, min(most, round(side * ratio))) for most, side in zip(size, sides, strict=True))
    return height, width


def pad_to(images: Tensor, size: tuple[int, int], info: dict[str, Any], pixels: bool) -> Tensor:
    """Pad images (B, 3, H, W) at the right and the bottom with the mean: zeros, or gray where the file takes pixels.

    Args:
        images: Normalized, or of values from 0 to 255.
        size: Height and width.
        info: What the file says about itself.
        pixels: Whether it takes pixels.

    Returns:
        The images: float32, or pixels as uint8.
    """
    behind = (0, size[1] - images.shape[3], 0, size[0] - images.shape[2])
    images = F.pad(images, behind, value=sum(info['mean']) / 3 if pixels else 0.0)
    return images.round().to(torch.uint8) if pixels else images


class ResizeInside(Resize):
    """mmcv's `Resize` to the largest size of the same ratio within (height, width)."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(scale=size[::-1])
        self.size = size

    def transform(self, results: dict) -> dict:
        """Resize `img`, and tell its new size and scale."""
        height, width = fit_inside(results['img'].shape[:2], self.size)
        results['scale'] = width, height
        self._resize_img(results)
        return results


class Detector(BaseModel):
    """An exported detector with the interface of mmdet's."""

    def __init__(self, exported: Exported) -> None:
        super().__init__(exported.preprocessor('DetDataPreprocessor'))
        self.exported = exported

    def forward(self, inputs: Tensor, data_samples: list[Any], mode: str = 'predict') -> list[Any]:
        """Detect objects in images (B, 3, H, W): `data_samples` with `pred_instances`, in pixels of the files."""
        for sample, *outs in zip(data_samples, *self.exported(inputs), strict=True):
            sample.pred_instances = _instances(outs, sample, self.exported.info.get('mask_threshold'))
        return data_samples


def _instances(outs: Sequence[Tensor], sample: Any, mask_threshold: float | None) -> InstanceData:
    """Return what was found in one image, in pixels of its file."""
    boxes, scores, labels, *masks = outs
    height, width = sample.img_shape[:2]
    boxes = boxes.minimum(boxes.new_tensor([width, height, width, height]))
    # The file fills up with the score -1; what lies in the padding has no area.
    found = (scores >= 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes = boxes[found] / boxes.new_tensor(sample.scale_factor).repeat(2)
    instances = InstanceData(bboxes=boxes, scores=scores[found], labels=labels[found])
    if masks:
        instances.masks = _paste(masks[0][found], boxes, sample.ori_shape[:2], mask_threshold)
    return instances


def _paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float | None) -> Tensor:
    """Return masks (N, *size), bool, from probabilities (N, M, M) inside boxes."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    pasted = torch.zeros(len(masks), *size, dtype=torch.bool)
    for whole, mask, box in zip(pasted, masks, boxes, strict=True):
        values, place = _do_paste_mask(mask[None, None], box[None], *size)
        whole[place] = values[0] >= threshold
    return pasted


def _make_segmenter(exported: Exported) -> BaseModel:
    from mmseg.models import EncoderDecoder

    class Segmenter(EncoderDecoder):
        """An exported segmenter: mmseg's way to whole images and windows around another network."""

        def __init__(self) -> None:
            BaseModel.__init__(self, exported.preprocessor('SegDataPreProcessor'))
            self.test_cfg, self.align_corners = ConfigDict(mode='whole'), False
            self.out_channels = len(exported.info['classes'])

        def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
            (out,) = exported(inputs)
            out = out[..., : inputs.shape[2], : inputs.shape[3]]
            return out if out.ndim == 4 else F.one_hot(out, self.out_channels).movedim(-1, 1).float()

    return Segmenter()


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
