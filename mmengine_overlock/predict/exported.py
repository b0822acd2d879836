"""Run ONNX files of `overlock export` in the place of mmdet's and mmseg's models."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    session = Session(path, device)
    detector = session.info['task'] == 'detector'
    scope = 'mmdet' if detector else 'mmseg'
    import_module(scope)
    if tile and not detector and session.size and tile > min(session.size):
        raise UserError(
            f'{path} takes images of {session.size[0]}x{session.size[1]}: tiles can have at most '
            f'{min(session.size)} pixels a side, got {tile}.'
        )
    pack: dict[str, Any] = dict(type='PackSegInputs')
    if detector:
        pack = dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor'))
    steps = [ResizeInside(session.size)] if session.size else session.steps()
    pipeline = [dict(type='LoadImageFromNDArray'), *steps, pack]
    with DefaultScope.overwrite_default_scope(scope):
        model = Detector(session) if detector else _make_segmenter(session)
    return Network(model.eval(), scope, pipeline, tuple(session.info.get('classes', ())), session.info.get('palette'))


def open_session(path: Path, providers: Sequence[Any] = ('CPUExecutionProvider',)) -> Any:
    """Return an `onnxruntime.InferenceSession` that is silent and has as many threads as PyTorch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=list(providers))


class Session:
    """An exported file in onnxruntime.

    Args:
        path: The file.
        device: Such as 'cuda' or 'cpu'; by default a GPU where onnxruntime has one.

    Attributes:
        info: What the file says about itself.
        size: Height and width of all images, where they are fixed.
        pixels: Whether it takes pixels and normalizes them itself.
    """

    def __init__(self, path: Path, device: str | torch.device | None) -> None:
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
            self._session = open_session(path, providers)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise UserError(f'onnxruntime cannot open {path} ({reason}); export it again.') from None
        # It goes on without CUDA where its libraries are missing.
        if device is not None and kind == 'cuda' and cuda not in self._session.get_providers():
            raise UserError(
                f'onnxruntime cannot use the device {device}: it lacks libraries of CUDA or cuDNN that it needs, or '
                'there is no such GPU; mend that, or give cpu.'
            )
        meta = self._session.get_modelmeta().custom_metadata_map
        self.info: dict[str, Any] = {name: _parse(value) for name, value in meta.items()}
        if self.info.get('task') not in ('detector', 'segmenter'):
            raise UserError(
                f'{path} must be a detector or segmenter written by `overlock export`, but its metadata says '
                f'{"it is a " + str(self.info["task"]) if "task" in self.info else "nothing"}.'
            )
        needed = ['mean', 'std', 'pad_size_divisor', 'smallest_side']
        needed += ['classes'] if self.info['task'] == 'segmenter' else []
        if lacking := [name for name in needed if name not in self.info]:
            raise UserError(f'The metadata of {path} lack {", ".join(lacking)}; export it again, with its checkpoint.')
        batch, _, *size = self._session.get_inputs()[0].shape
        self.size: tuple[int, int] | None = tuple(size) if all(isinstance(side, int) for side in size) else None
        self._one_by_one = isinstance(batch, int)
        self.pixels = 'uint8' in self._session.get_inputs()[0].type

    def steps(self) -> list[dict[str, Any]]:
        """Return the transforms that bring an image to the size that the network was tested at.

        Raises:
            UserError: The file does not have them, or they are none of those in the configurations of this package.
        """
        steps = self.info.get('pipeline')
        if not isinstance(steps, list) or not all(isinstance(step, dict) and 'type' in step for step in steps):
            steps = None
        if steps is None or strangers(steps):
            raise UserError(f'The metadata of the model lack its test pipeline, got {steps}; export it again.')
        return [
            {name: tuple(value) if isinstance(value, list) else value for name, value in step.items()} for step in steps
        ]

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
        value = sum(self.info['mean']) / 3 if self.pixels else 0.0
        images = F.pad(images, (0, target[1] - sides[1], 0, target[0] - sides[0]), value=value).cpu()
        if self.pixels:
            images = images.round().to(torch.uint8)
        batches = images.split(1 if self._one_by_one else len(images))
        outs = [self._session.run(None, {'image': batch.numpy()}) for batch in batches]
        return [torch.cat([torch.from_numpy(part) for part in parts]) for parts in zip(*outs, strict=True)]


class ResizeInside(Resize):
    """mmcv's `Resize` to the largest size of the same ratio within (height, width)."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__(scale=size[::-1])
        self.size = size

    def transform(self, results: dict) -> dict:
        """Resize `img`, and tell its new size and scale."""
        sides = results['img'].shape[:2]
        ratio = min(most / side for most, side in zip(self.size, sides, strict=True))
        height, width = (max(1, min(most, round(side * ratio))) for most, side in zip(self.size, sides, strict=True))
        results['scale'] = width, height
        self._resize_img(results)
        return results


class Detector(BaseModel):
    """An exported detector with the interface of mmdet's.

    A file that does not pad by itself takes padding for a part of the image, and may place boxes in it before they are
    clipped here; one exported with `--preprocessing` detects what mmdet does.

    Args:
        session: The file.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session.preprocessor('DetDataPreprocessor'))
        self.session = session

    def forward(self, inputs: Tensor, data_samples: list[Any], mode: str = 'predict') -> list[Any]:
        """Detect objects in images (B, 3, H, W): `data_samples` with `pred_instances`, in pixels of the files."""
        for sample, *outs in zip(data_samples, *self.session(inputs), strict=True):
            sample.pred_instances = to_instances(outs, sample, self.session.info.get('mask_threshold'))
        return data_samples


def to_instances(outs: Sequence[Tensor], sample: Any, mask_threshold: float | None) -> InstanceData:
    """Return what an exported detector found in one image, in pixels of its file.

    Args:
        outs: Boxes, scores, labels and perhaps masks, as `mmengine_overlock.export` describes them, without batch.
        sample: mmdet's data sample of the image.
        mask_threshold: From which probability on a pixel belongs to a mask.
    """
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


def _make_segmenter(session: Session) -> BaseModel:
    from mmseg.models import EncoderDecoder

    class Segmenter(EncoderDecoder):
        """An exported segmenter: mmseg's way to whole images and windows around another network."""

        def __init__(self) -> None:
            BaseModel.__init__(self, session.preprocessor('SegDataPreProcessor'))
            self.test_cfg, self.align_corners = ConfigDict(mode='whole'), False
            self.out_channels = len(session.info['classes'])

        def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
            (out,) = session(inputs)
            out = out[..., : inputs.shape[2], : inputs.shape[3]]
            return out if out.ndim == 4 else F.one_hot(out, self.out_channels).movedim(-1, 1).float()

    return Segmenter()


def _parse(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
