"""The toolboxes' inferencers, sahi and supervision take the checkpoints of a training, after a plain import."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mmengine_overlock.run import train
from tests.mmengine_overlock.data_sets import CLASSES, write_coco, write_maps
from tests.mmengine_overlock.test_deploy import CONFIGS

pytestmark = pytest.mark.slow

TRAINING = {
    'detector': """
data = dict(type='CocoDataset', data_root='.', ann_file='annotations/a.json', data_prefix=dict(img='train/'),
            metainfo=dict(classes=('cat', 'dog', 'bird')), filter_cfg=None)
model.update(data_preprocessor=dict(pad_size_divisor=32))
model['roi_head']['bbox_head']['num_classes'] = model['roi_head']['mask_head']['num_classes'] = 3
test_dataloader['dataset'].update(data)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**data, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True), small,
    dict(type='PackDetInputs')]))
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(ann_file='annotations/a.json')
""",
    'segmenter': """
data = dict(type='BaseSegDataset', data_root='.', metainfo=dict(classes=('cat', 'dog', 'bird')),
            reduce_zero_label=True,
            data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'))
model.update(data_preprocessor=dict(size=(64, 64)))
model['decode_head'].update(num_classes=3, norm_cfg=dict(type='BN'))
model['auxiliary_head'].update(num_classes=3, norm_cfg=dict(type='BN'))
small = dict(type='Resize', scale=(64, 64))
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**data, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), small, dict(type='PackSegInputs')]))
# The name that `inference_model` reads.
test_pipeline = [dict(type='LoadImageFromFile'), small, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(**data, pipeline=test_pipeline))
val_dataloader = test_dataloader
""",
}
ONE_ITERATION = """
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=1, val_interval=1)
train_dataloader['sampler'] = dict(type='InfiniteSampler')
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1), logger=dict(interval=1))
log_processor = dict(by_epoch=False)
param_scheduler = []
work_dir = 'work'
"""
OPEN = {
    'detector': """
import mmdet_overlock
from mmdet.apis import DetInferencer, inference_detector, init_detector
found = {}
result = DetInferencer('config.py', 'work/iter_1.pth', device='cpu')('photo.png')
found['DetInferencer'] = result['predictions'][0]['scores']
found['of itself'] = DetInferencer(None, 'work/iter_1.pth', device='cpu')('photo.png')['predictions'][0]['scores']
model = init_detector('config.py', 'work/iter_1.pth', device='cpu')
sample = inference_detector(model, 'photo.png')
found['init_detector'] = sample.pred_instances.scores.tolist()
import supervision
detections = supervision.Detections.from_mmdetection(sample)
found['supervision'] = detections.confidence.tolist()
assert detections.mask.shape == (20, 96, 128) and detections.class_id.max() < 3
from sahi import AutoDetectionModel
from sahi.predict import get_prediction, get_sliced_prediction
model = AutoDetectionModel.from_pretrained(
    'mmdet', model_path='work/iter_1.pth', config_path='config.py', confidence_threshold=0.0, device='cpu')
assert model.category_names == ['cat', 'dog', 'bird'] or model.category_names == ('cat', 'dog', 'bird')
whole = get_prediction('photo.png', model).object_prediction_list
found['sahi'] = [item.score.value for item in whole]
tiles = get_sliced_prediction('photo.png', model, 64, 64, verbose=0).object_prediction_list
assert tiles and {item.category.name for item in tiles} <= {'cat', 'dog', 'bird'}
""",
    'segmenter': """
import mmseg_overlock
from mmseg.apis import MMSegInferencer, inference_model, init_model
found = {}
result = MMSegInferencer('config.py', 'work/iter_1.pth', device='cpu')('photo.png', return_datasamples=True)
found['MMSegInferencer'] = result.pred_sem_seg.data.flatten().tolist()
model = init_model('config.py', 'work/iter_1.pth', device='cpu')
assert tuple(model.dataset_meta['classes']) == ('cat', 'dog', 'bird')
found['init_model'] = inference_model(model, 'photo.png').pred_sem_seg.data.flatten().tolist()
""",
}


@pytest.mark.parametrize('kind', TRAINING)
def test_a_training_checkpoint_opens_everywhere_and_predicts_alike(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (write_coco if kind == 'detector' else write_maps)(tmp_path)
    text = CONFIGS[kind].replace('backbone=dict(', 'backbone=dict(init_cfg=None, ', 1) + TRAINING[kind] + ONE_ITERATION
    (tmp_path / 'config.py').write_text(text)
    train('config.py', check=False)
    checkpoint = torch.load(tmp_path / 'work/iter_1.pth', weights_only=False)
    assert 'train/loss' in checkpoint['message_hub']['log_scalars']
    assert tuple(checkpoint['meta']['dataset_meta']['classes']) == CLASSES
    if kind == 'detector':
        # sahi raises at masks of single pixels, which random weights give.
        checkpoint['state_dict']['roi_head.mask_head.conv_logits.bias'] += 20
        torch.save(checkpoint, tmp_path / 'work/iter_1.pth')
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    script = OPEN[kind] + "\nimport json\njson.dump(found, open('found.json', 'w'))"
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    first, *others = json.loads((tmp_path / 'found.json').read_text()).values()
    assert len(first) == (20 if kind == 'detector' else 96 * 128)
    for other in others:
        np.testing.assert_allclose(sorted(other), sorted(first), rtol=1e-4)
