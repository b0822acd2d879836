"""What can be exported, each as a module from one image tensor to named outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from PIL import Image
from torch import Tensor, nn

from mmengine_overlock.config import load_config
from mmengine_overlock.deploy import build
from mmengine_overlock.export.modules import Outputs, Preprocessed, Segmenter, normalize, pad
from mmengine_overlock.predict import dataset_meta, test_pipeline
from mmengine_overlock.quiet import quiet
from overlock import ARCHS, MOGANET_ARCHS, MogaNet, OverLoCK
from overlock.checkpoint import find_file, load
from overlock.checkpoint.convert import read_classes
from overlock.checkpoint.recognize import recognize
from overlock.utils.errors import UserError

# ImageNet's, in RGB.
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
_CLASSIFIERS = {
    **{f'overlock_{name}': (OverLoCK, name) for name in ARCHS},
    **{f'moganet_{name}': (MogaNet, name) for name in MOGANET_ARCHS},
}


@dataclass
class Subject:
    """A network to export.

    Attributes:
        kind: 'classifier', 'backbone', 'segmenter' or 'detector'.
        module: From an image (B, 3, H, W) to a tuple of tensors; folded, in evaluation.
        outputs: Their names.
        least: The smallest height and width.
        pipeline: Reads an image file; None for ImageNet's way.
        reference: What the toolbox itself detects in such an input: boxes, scores, labels. Detectors have one.
        info: What a program that runs the file has to know.
        model, cfg: The detector or segmenter as the toolbox has it, and its configuration; None for classifiers.
    """

    kind: str
    module: nn.Module
    outputs: tuple[str, ...]
    least: int
    pipeline: Compose | None = None
    reference: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    info: dict[str, Any] = field(default_factory=dict)
    model: BaseModel | None = None
    cfg: Config | None = None

    def example(self, batch: int, height: int, width: int) -> Tensor:
        """Return an image of random pixels that the module takes."""
        pixels = torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0))
        if isinstance(self.module, Preprocessed):
            return pixels.to(torch.uint8)
        return normalize(pixels, self.info['mean'], self.info['std'])

    def read(self, path: Path) -> Tensor:
        """Return an image file as the module takes it, (1, 3, H, W).

        Raises:
            UserError: The file cannot be read.
        """
        try:
            Image.open(path).verify()
        except (OSError, SyntaxError) as error:
            raise UserError(f'the image {path} cannot be read ({error}); give another one') from None
        if self.pipeline is None:
            pixels = _read_square(path)
        else:
            # In BGR.
            pixels = self.pipeline(dict(img_path=str(path), img_id=0))['inputs'].flip(0).contiguous()
        if isinstance(self.module, Preprocessed):
            return pixels[None]
        return pad(normalize(pixels[None], self.info['mean'], self.info['std']), self.info['pad_size_divisor'])


def make_subject(
    config: str | Path,
    checkpoint: str | None,
    *,
    part: str = 'all',
    preprocessing: bool = False,
    label_map: bool = False,
    cfg_options: dict[str, Any] | None = None,
) -> Subject:
    """Build what is to be exported; see `mmengine_overlock.export.export`."""
    source = find_file(checkpoint) if checkpoint else None
    torch.manual_seed(0)
    if str(config) in _CLASSIFIERS:
        if label_map or part != 'all' or cfg_options:
            raise UserError(f'--part, --label-map and --cfg-options are for configurations; leave them out of {config}')
        subject = _classifier(str(config), source)
    else:
        cfg = load_config(config, cfg_options)
        if 'backbone' not in cfg.get('model', {}):
            raise UserError(
                f'{config} must be the configuration of a detector or segmenter, or one of the classifiers '
                f'{", ".join(_CLASSIFIERS)}'
            )
        with quiet():
            model = build(cfg, load(source) if source else None, str(checkpoint))
        model.backbone.switch_to_deploy()
        subject = _dense(cfg, model, part, label_map)
        subject.info |= _classes(cfg, source)
    if preprocessing:
        subject.module = Preprocessed(subject.module, subject.info['mean'], subject.info['std'])
        subject.info['input'] = 'RGB pixels, uint8, (B, 3, H, W)'
    subject.module.eval()
    return subject


def _classifier(name: str, source: Path | None) -> Subject:
    if source is None:
        kind, arch = _CLASSIFIERS[name]
        network = kind(arch)
    else:
        network = recognize(load(source), source.name).network
        if not isinstance(network, _CLASSIFIERS[name][0]):
            raise UserError(f'{source} holds a {type(network).__name__}, expected the classifier {name}')
    module = Outputs(network.eval().switch_to_deploy())
    return Subject('classifier', module, ('logits',), 33, info=_info())


def _info(mean: Sequence[float] = MEAN, std: Sequence[float] = STD, divisor: int = 1) -> dict[str, Any]:
    return {
        'input': 'RGB, (pixel - mean) / std, float32, (B, 3, H, W)',
        'mean': list(mean),
        'std': list(std),
        'pad_size_divisor': divisor,
    }


def _dense(cfg: Config, model: BaseModel, part: str, label_map: bool) -> Subject:
    """Return a detector, a segmenter, or the backbone of one."""
    settings = cfg.model.get('data_preprocessor') or {}
    divisor = settings.get('pad_size_divisor', 1)
    info = _info(settings.get('mean', MEAN), settings.get('std', STD), divisor)
    strides = max(model.backbone.out_indices)
    if label_map and (part != 'all' or not hasattr(model, 'decode_head')):
        raise UserError(f'--label-map is for segmenters, and {cfg.filename} with --part {part} is none; leave it out')
    if part == 'backbone':
        names = tuple(f'stride{2 ** (i + 2)}' for i in model.backbone.out_indices)
        subject = Subject('backbone', Outputs(model.backbone), names, 2 ** (strides + 2) + 1, info=info)
    elif hasattr(model, 'decode_head'):
        module = Segmenter(model, label_map)
        subject = Subject('segmenter', module, ('labels' if label_map else 'logits',), 33, info=info)
    else:
        subject = _detector(cfg, model, info)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        subject.pipeline = Compose(test_pipeline(cfg))
    # Between reading and packing: how an image comes to its size.
    subject.info |= {'pipeline': test_pipeline(cfg)[1:-1], 'smallest_side': subject.least}
    subject.model, subject.cfg = model, cfg
    return subject


def _detector(cfg: Config, model: BaseModel, info: dict[str, Any]) -> Subject:
    from mmengine_overlock.export.detectors import OneStage, TwoStage

    names: tuple[str, ...] = ('boxes', 'scores', 'labels')
    divisor = info['pad_size_divisor']
    # Of what is left to do outside.
    info['pad_size_divisor'] = 1
    if type(model).__name__ in ('MaskRCNN', 'CascadeRCNN', 'FasterRCNN'):
        module: nn.Module = TwoStage(model, divisor)
        strides = [stride for stride, _ in model.rpn_head.prior_generator.strides]
        if model.roi_head.with_mask:
            names += ('masks',)
            info['mask_threshold'] = model.roi_head.test_cfg.mask_thr_binary
    elif type(model).__name__ == 'RetinaNet':
        module = OneStage(model, divisor)
        strides = [stride for stride, _ in model.bbox_head.prior_generator.strides]
    else:
        raise UserError(
            f'{cfg.filename} has a {type(model).__name__}, expected Mask R-CNN, Faster R-CNN, Cascade R-CNN, RetinaNet '
            'or a segmenter; export its backbone with --part backbone'
        )
    # A map of one pixel would be taken for a constant.
    subject = Subject('detector', module, names, max(strides) + 1, info=info)
    subject.reference = lambda image: _detect(model, image, subject, divisor)
    return subject


@torch.no_grad()
def _detect(model: BaseModel, image: Tensor, subject: Subject, divisor: int) -> tuple[Tensor, ...]:
    """Return boxes (N, 4), scores and labels (N,) that mmdet's own code finds in one image."""
    from mmdet.structures import DetDataSample

    shape = tuple(image.shape[2:])
    if isinstance(subject.module, Preprocessed):
        image = normalize(image, subject.info['mean'], subject.info['std'])
    image = pad(image, divisor)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=shape, ori_shape=shape, batch_input_shape=tuple(image.shape[2:]), scale_factor=(1.0, 1.0)
        )
    )
    found = model.predict(image, [sample], rescale=False)[0].pred_instances
    return found.bboxes, found.scores, found.labels


def _read_square(path: Path) -> Tensor:
    """Read an image as ImageNet's are, 224x224 out of the middle: RGB (3, 224, 224), uint8."""
    with Image.open(path) as file:
        image = file.convert('RGB')
    scale = 256 / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - 224) // 2 for side in image.size)
    return torch.from_numpy(np.array(image.crop((left, top, left + 224, top + 224)))).permute(2, 0, 1)


def _classes(cfg: Config, source: Path | None) -> dict[str, Any]:
    """Return the names of the classes by the checkpoint, else by the data set of the configuration."""
    known = dataset_meta(cfg)
    if source is not None:
        given = read_classes(source)
        known |= copy.deepcopy(given.get('dataset_meta') or {name.lower(): value for name, value in given.items()})
    return {name: list(known[name]) for name in ('classes', 'palette') if known.get(name)}
