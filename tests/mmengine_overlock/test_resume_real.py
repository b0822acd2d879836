"""Resumed detectors and segmenters equal uninterrupted ones: published configurations with the smallest network."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from overlock.models.arch import Arch
from tests.mmengine_overlock.runs import assert_equal, saved, start, statuses
from tests.testing import ROOT, TINY

pytestmark = pytest.mark.slow

CHANNELS = list(Arch(**TINY).out_channels)


def photographs(folder, number=6):
    """Draw images of noise, wide and high ones."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    sizes = [(64, 48) if index % 2 else (48, 64) for index in range(number)]
    for index, (height, width) in enumerate(sizes):
        pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{index}.jpg')
    return sizes


def detection(folder):
    sizes = photographs(folder / 'data' / 'train2017')
    shutil.copytree(folder / 'data' / 'train2017', folder / 'data' / 'val2017')
    images = [dict(id=i, file_name=f'{i}.jpg', height=h, width=w) for i, (h, w) in enumerate(sizes)]
    boxes = [
        dict(id=2 * i + j, image_id=i, category_id=1 + j, bbox=[4 + 9 * j, 6, 30, 34], area=1020, iscrowd=0,
             segmentation=[[4 + 9 * j, 6, 34 + 9 * j, 6, 34 + 9 * j, 40, 4 + 9 * j, 40]])
        for i in range(len(sizes)) for j in range(2)
    ]  # fmt: skip
    content = dict(images=images, annotations=boxes, categories=[dict(id=1, name='one'), dict(id=2, name='two')])
    (folder / 'data' / 'annotations').mkdir()
    for split in ('train', 'val'):
        (folder / 'data' / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))
    cfg = Config.fromfile(ROOT / 'configs' / 'mask_rcnn_overlock_xt_1x.py')
    model, width = cfg.model, 16
    model.neck.update(in_channels=CHANNELS, out_channels=width)
    model.rpn_head.update(in_channels=width, feat_channels=width)
    roi = model.roi_head
    roi.bbox_roi_extractor.out_channels = roi.mask_roi_extractor.out_channels = width
    roi.bbox_head.update(in_channels=width, fc_out_channels=32, num_classes=2)
    roi.mask_head.update(num_convs=1, in_channels=width, conv_out_channels=width, num_classes=2)
    model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    model.train_cfg.rcnn.sampler.num = 16
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='RandomFlip', prob=0.5),
        dict(type='RandomChoiceResize', scales=[(64, 64), (80, 80), (96, 96)], keep_ratio=True),
        dict(type='PhotoMetricDistortion'),
        dict(type='RandomCrop', crop_size=(60, 60), allow_negative_crop=True),
        dict(type='PackDetInputs'),
    ]
    cfg.train_dataloader.dataset.update(
        pipeline=pipeline, metainfo=dict(classes=('one', 'two')), filter_cfg=dict(min_size=8)
    )
    return cfg


def segmentation(folder):
    root = folder / 'data'
    sizes = photographs(root / 'images' / 'training')
    (root / 'annotations' / 'training').mkdir(parents=True)
    for index, size in enumerate(sizes):
        labels = np.random.default_rng(index).integers(0, 151, size, dtype=np.uint8)
        Image.fromarray(labels).save(root / 'annotations' / 'training' / f'{index}.png')
    for part in ('images', 'annotations'):
        shutil.copytree(root / part / 'training', root / part / 'validation')
    cfg = Config.fromfile(ROOT / 'configs' / 'upernet_overlock_xt_160k.py')
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.decode_head.update(in_channels=CHANNELS, channels=8)
    cfg.model.auxiliary_head.update(in_channels=CHANNELS[2], channels=8)
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline[2].scale, pipeline[3].crop_size = (96, 48), (64, 64)
    return cfg


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a configuration with its data: by epochs or by iterations, with some workers."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def write(kind, by_iteration, workers):
        cfg = kind(tmp_path)
        cfg.model.backbone.update(arch=TINY, drop_path_rate=0.3, init_cfg=None)
        loader = cfg.train_dataloader
        loader.update(num_workers=workers, persistent_workers=workers > 0)
        sampler = 'InfiniteSampler' if by_iteration else 'DefaultSampler'
        loader.sampler = dict(type=sampler, shuffle=True)
        if by_iteration:
            cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=6, val_interval=100)
        else:
            cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=100)
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1)
        cfg.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
        cfg.randomness = dict(seed=0)
        cfg.dump(tmp_path / 'config.py')
        return tmp_path / 'config.py'

    yield write
    torch.set_num_threads(threads)


@pytest.mark.parametrize('by_iteration, workers, processes', [(False, 0, 1), (True, 2, 1), (False, 2, 2)])
@pytest.mark.parametrize('kind', [detection, segmentation])
def test_resumed_training_equals_the_uninterrupted(write, tmp_path, kind, by_iteration, workers, processes):
    config = write(kind, by_iteration, workers)
    data = dict(data_root=tmp_path / 'data')
    assert statuses(start(config, tmp_path / 'whole', processes, **data), 300) == [0] * processes
    last = max(int(path.stem[5:]) for path in (tmp_path / 'whole').glob('iter_*.pth'))
    middle = last // 2 + 1
    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'whole' / f'iter_{middle}.pth', tmp_path / 'resumed')
    resumed = start(config, tmp_path / 'resumed', processes, resume='auto', **data)
    assert statuses(resumed, 300) == [0] * processes
    whole = saved(tmp_path / 'whole' / f'iter_{last}.pth')
    assert_equal(saved(tmp_path / 'resumed' / f'iter_{last}.pth'), whole)
    before = saved(tmp_path / 'whole' / f'iter_{middle}.pth')['state_dict']
    assert any(not torch.equal(value, before[name]) for name, value in whole['state_dict'].items())
    assert os.environ.get('RANK') is None
