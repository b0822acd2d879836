"""Small models of each kind, trained by nobody: random weights that find objects everywhere."""

import logging

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from mmengine_overlock.deploy import build
from tests.testing import ROOT, TINY, randomise

# Configuration, and what makes it small.
SMALL = {
    'mask_rcnn': 'mask_rcnn_overlock_xt_1x',
    'cascade': 'cascade_overlock_xt_1x',
    'retinanet': 'retinanet_moganet_xt_1x',
    'upernet': 'upernet_overlock_xt_160k',
    'semantic_fpn': 'fpn_moganet_xt_80k',
}
CLASSES = {'classes': ('Katze', 'chien', '犬'), 'palette': [(1, 2, 3), (4, 5, 6), (7, 8, 9)]}


def small_config(kind: str) -> Config:
    """Return the shipped configuration with OverLoCK's tiny variant and narrow heads."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{SMALL[kind]}.py')
    model = cfg.model
    model.backbone = dict(type='OverLoCK', arch=TINY, overview_residual='neck' in model)
    channels = [8, 16, 24, 40]
    if 'neck' in model:
        model.neck.update(in_channels=channels, out_channels=16)
    if 'decode_head' in model:
        model.decode_head.update(in_channels=channels if kind == 'upernet' else [16] * 4, channels=16, num_classes=3)
        model.pop('auxiliary_head', None)
        return cfg
    test = model.test_cfg
    if kind == 'retinanet':
        model.bbox_head.update(in_channels=16, feat_channels=16, num_classes=3)
        test.update(max_per_img=30)
        return cfg
    model.rpn_head.update(in_channels=16, feat_channels=16)
    roi = model.roi_head
    heads = roi.bbox_head if isinstance(roi.bbox_head, list) else [roi.bbox_head]
    for head in heads:
        head.update(in_channels=16, fc_out_channels=16, num_classes=3)
        if 'conv_out_channels' in head:
            head.update(conv_out_channels=16)
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = 16
    roi.mask_head.update(in_channels=16, conv_out_channels=16, num_classes=3)
    test.rpn.update(nms_pre=300, max_per_img=100)
    # Of as many the one or two at the end, whose scores nearly tie with those left out, are a small share.
    test.rcnn.update(max_per_img=100)
    return cfg


@pytest.fixture(scope='session')
def small(tmp_path_factory):
    """Write configuration and checkpoint of a kind, once, and return their paths."""
    folder, made = tmp_path_factory.mktemp('small'), {}

    def make(kind):
        if kind not in made:
            cfg = small_config(kind)
            step = dict(type='Resize', scale=(192, 160), keep_ratio=True)
            pack = cfg.test_dataloader.dataset.pipeline[-1]
            cfg.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), step, pack]
            cfg.dump(folder / f'{kind}.py')
            cfg.filename = None
            logging.disable(logging.INFO)
            model = build(cfg, None)
            logging.disable(logging.NOTSET)
            randomise(model.backbone)
            generator = torch.Generator().manual_seed(0)
            for name, value in model.named_parameters():
                if not name.startswith('backbone') and value.ndim > 1:
                    noise = torch.randn(value.shape, generator=generator)
                    # Scores of exactly 1 would tie, and boxes less than a pixel thin tip by rounding.
                    gain = 0.1 if name.endswith(('cls.weight', 'reg.weight')) else 2
                    value.data.copy_(noise * (gain / value[0].numel()) ** 0.5)
            meta = {'dataset_meta': CLASSES}
            torch.save({'state_dict': model.state_dict(), 'meta': meta}, folder / f'{kind}.pth')
            made[kind] = folder / f'{kind}.py', folder / f'{kind}.pth'
        return made[kind]

    return make


@pytest.fixture(scope='session')
def picture(tmp_path_factory):
    """An image file of smooth blots, of an odd size."""
    path = tmp_path_factory.mktemp('pictures') / 'blots.png'
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((203, 151), Image.Resampling.BICUBIC).save(path)
    return path
