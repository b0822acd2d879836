"""The detectors and segmenters that benchmarks/detector.py measures, each as a `benchmarks.rounds.Case`."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS, OPTIM_WRAPPERS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from benchmarks.parts import Clock, tensors
from benchmarks.presets import randomise
from mmengine_overlock.amp import BFloat16OptimWrapper, enable_amp
from mmengine_overlock.config import load_config
from mmengine_overlock.predict import build_model
from mmengine_overlock.speed import tune_for_inference, tune_for_training
from overlock import keep_freed_memory
from overlock.utils.configs import find_config

# In place of the backbone, with random weights.
BESIDE: dict[str, dict[str, Any]] = {
    'convnext_tiny': dict(type='TimmBackbone', name='convnext_tiny'),
    'swin_tiny': dict(type='SwinTransformer', depths=(2, 2, 6, 2), drop_path_rate=0.1),
}
CHANNELS = [96, 192, 384, 768]
# Method by method, inner parts apart from the outer ones; assigners and losses are `other`.
PARTS = {
    ('data_preprocessor', 'forward'): 'data',
    ('backbone', 'forward'): 'backbone',
    ('neck', 'forward'): 'neck',
    ('rpn_head', 'forward'): 'RPN',
    ('rpn_head', 'predict_by_feat'): 'proposals',
    ('roi_head.bbox_roi_extractor', 'forward'): 'RoIAlign',
    ('roi_head.mask_roi_extractor', 'forward'): 'RoIAlign',
    ('roi_head.bbox_head', 'forward'): 'box heads',
    ('roi_head.bbox_head', 'predict_by_feat'): 'post-processing',
    ('roi_head.mask_head', 'forward'): 'mask heads',
    ('roi_head.mask_head', 'predict_by_feat'): 'post-processing',
    ('decode_head', 'forward'): 'head',
    ('auxiliary_head', 'forward'): 'auxiliary head',
    ('', 'postprocess_result'): 'post-processing',
}


@MODELS.register_module()
class TimmBackbone(nn.Module):
    """The four maps of a network of timm."""

    def __init__(self, name: str) -> None:
        super().__init__()
        import timm

        self.body = timm.create_model(name, pretrained=False, features_only=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W) to maps at strides 4 to 32, which mmcv's RoIAlign takes for contiguous."""
        return tuple(out.contiguous() for out in self.body(x))


@dataclass
class DetectorCase:
    """One detector or segmenter, one mode, one shape; see `benchmarks.rounds`."""

    row: str  # 'built', 'mmdet' (by itself, without what our tools do), 'tuned', or a key of `BESIDE`
    config: str
    mode: str  # 'test', or 'train' with the configuration's optimizer
    size: tuple[int, int]  # height and width of the images
    batch: int
    dtype: str  # 'fp32' or 'bf16'
    device: torch.device

    def __post_init__(self) -> None:
        self.device, training = torch.device(self.device), self.mode == 'train'
        self.facts: dict[str, Any] = {}
        cfg = load_config(find_config(self.config))
        self.scope = cfg.default_scope
        if self.row in BESIDE:
            cfg.model.backbone = {'_scope_': self.scope, **BESIDE[self.row]}
            places = ('neck', 'in_channels') if cfg.model.get('neck') else ('decode_head', 'in_channels')
            cfg.model[places[0]][places[1]] = CHANNELS
            if cfg.model.get('auxiliary_head'):
                cfg.model.auxiliary_head.in_channels = CHANNELS[2]
        if 'size' in cfg.model.data_preprocessor:  # of mmseg's crops, to which it pads
            cfg.model.data_preprocessor.size = self.size
        torch.manual_seed(0)
        self.model = build_model(cfg)
        logging.disable()  # a line for each weight
        self.model.init_weights()
        if self.row not in BESIDE:
            randomise(self.model.backbone)
        confide(self.model)
        self.model.to(self.device).train(training)
        if self.row != 'mmdet':
            if self.device.type == 'cpu':
                keep_freed_memory()
            if training:
                tune_for_training(self.model)
        if self.row == 'tuned':
            tune_for_inference(self.model, torch.bfloat16 if self.dtype == 'bf16' else None)
        self.clock, self.maps = Clock(self.device.type == 'cuda'), dict[str, Tensor]()
        last = self.model.neck if getattr(self.model, 'neck', None) else self.model.backbone
        if not training:  # a map would keep the graph
            last.register_forward_hook(lambda module, args, outs: self.maps.update(numbered('output map', outs)))
        for (name, method), part in PARTS.items():
            for owner in find(self.model, name):
                if hasattr(owner, method):
                    self.clock.watch(owner, method, part)
        if training:
            if self.dtype == 'bf16':
                enable_amp(cfg)
            kind = OPTIM_WRAPPERS.get(cfg.optim_wrapper.type)
            kind = kind if issubclass(kind, BFloat16OptimWrapper) else OPTIM_WRAPPERS.get('OptimWrapper')
            self.optimizer = kind(torch.optim.AdamW(self.model.parameters(), lr=1e-5))
            self.clock.watch(self.optimizer, 'step', 'optimizer')
            self.clock.watch(self.optimizer, 'zero_grad', 'optimizer')
            self.clock.watch(self.optimizer, 'backward', 'heads, backward')
        self.data = make_data(self.scope, self.size, self.batch, training, cfg)

    def run(self, parts: bool = False) -> dict[str, Tensor]:
        """Run one iteration; return maps before the heads and sorted scores, or the seconds of each part."""
        self.maps.clear()
        self.clock.on = parts
        self.clock.enter('other')
        self.clock.seconds.clear()
        data = dict(inputs=list(self.data['inputs']), data_samples=[x.clone() for x in self.data['data_samples']])
        with DefaultScope.overwrite_default_scope(self.scope):
            if self.mode == 'train':
                self.model.train_step(data, self.optimizer)
                found: dict[str, Tensor] = {}
            else:
                with torch.no_grad():
                    samples = self.model.test_step(data)
                found = {'output scores': torch.cat([scores(sample) for sample in samples])}
        self.clock.enter('other')
        if parts:
            return {part: torch.tensor(spent) for part, spent in self.clock.seconds.items()}
        return found | self.maps


def numbered(name: str, outs: Any) -> dict[str, Tensor]:
    """Return tensors by name and number."""
    return {f'{name} {i}': out for i, out in enumerate(tensors(outs))}


def find(model: nn.Module, name: str) -> list[Any]:
    """Return the module of a name, or those of its list; none where there is none."""
    owner: Any = model
    for part in filter(None, name.split('.')):
        owner = getattr(owner, part, None)
    return [] if owner is None else list(owner) if isinstance(owner, nn.ModuleList) else [owner]


def scores(sample: Any) -> Tensor:
    """Return the highest scores of boxes, or some logits of the pixels."""
    if 'seg_logits' in sample:
        return sample.seg_logits.data.flatten()[::97]
    return nn.functional.pad(sample.pred_instances.scores, (0, 20))[:20]


@torch.no_grad()
def confide(model: nn.Module) -> None:
    """Make box heads sure of some regions: random ones find nothing, and the mask head would have nothing to do."""
    generator = torch.Generator().manual_seed(2)
    for name, module in model.named_modules():
        for end, spread in (('fc_cls', 0.15), ('fc_reg', 2e-3), ('rpn_cls', 0.05)):
            if name.endswith(end):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * spread)
                module.bias.zero_()


def make_data(scope: str, size: tuple[int, int], batch: int, training: bool, cfg: Any) -> dict[str, list[Any]]:
    """Return images as data sets give them, in training with ten objects each or with a label for each pixel."""
    photos = sorted(Path(os.environ.get('OVERLOCK_DATA', ''), 'coco_tiny', 'val2017').glob('*.jpg'))
    generator, (height, width) = np.random.default_rng(0), size
    inputs, samples = [], []
    for i in range(batch):
        image = cv2.imread(str(photos[i % len(photos)])) if photos else generator.integers(0, 256, (*size, 3), np.uint8)
        inputs.append(torch.from_numpy(cv2.resize(image, (width, height))).permute(2, 0, 1).contiguous())
        meta = dict(img_id=i, img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
        samples.append(make_sample(scope, meta, generator, cfg if training else None))
    return dict(inputs=inputs, data_samples=samples)


def make_sample(scope: str, meta: dict[str, Any], generator: np.random.Generator, cfg: Any) -> Any:
    """Return a data sample, with drawn truth where a configuration is given."""
    height, width = meta['img_shape']
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample

        labels = generator.integers(0, 150, (1, height // 8, width // 8)).repeat(8, 1).repeat(8, 2)
        return SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=torch.from_numpy(labels)))
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    sample = DetDataSample(metainfo=meta)
    if cfg is not None:
        boxes = (generator.random((10, 4)) * 0.5 + [0, 0, 0.1, 0.1]) * [width, height, width, height]
        boxes[:, 2:] = np.minimum(boxes[:, :2] + boxes[:, 2:], [width, height])
        masks = np.zeros((10, height, width), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1:y2, x1:x2] = 1
        truth = dict(bboxes=torch.from_numpy(boxes).float(), labels=torch.arange(10))
        sample.gt_instances = InstanceData(**truth, masks=BitmapMasks(masks, height, width))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample
