"""The tools on photographs, with the smallest network at a small scale.

`OVERLOCK_DATA` names the folder that holds `coco_tiny` and `ade_tiny`, a few images in COCO's and ADE20K's layouts.
"""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overlock import OverLoCK

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get('OVERLOCK_DATA', 'not set'))

pytestmark = pytest.mark.slow
needs_data = pytest.mark.skipif(
    not (DATA / 'coco_tiny').is_dir() or not (DATA / 'ade_tiny').is_dir(),
    reason='OVERLOCK_DATA does not name a folder with coco_tiny and ade_tiny',
)

DETECTION = f"""
_base_ = '{ROOT}/configs/mask_rcnn_overlock_xt_1x.py'
model = dict(backbone=dict(init_cfg=None),
             train_cfg=dict(rpn_proposal=dict(max_per_img=100), rcnn=dict(sampler=dict(num=32))),
             # Untrained heads give low scores.
             test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0, max_per_img=5)))
small = dict(type='Resize', scale=(256, 192), keep_ratio=True)
load = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
meta_keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
test_pipeline = [dict(type='LoadImageFromFile'), small, load, dict(type='PackDetInputs', meta_keys=meta_keys)]
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    indices=6, pipeline=[dict(type='LoadImageFromFile'), load, small, dict(type='PackDetInputs')]))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(indices=4, pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2, val_interval=2)
randomness = dict(seed=0)
"""

SEGMENTATION = f"""
_base_ = '{ROOT}/configs/upernet_overlock_xt_160k.py'
# Nothing random and no statistics of a batch, so that two processes can do what one does.
model = dict(data_preprocessor=dict(size=(128, 128)),
             backbone=dict(init_cfg=None, norm_eval=True, drop_path_rate=0.0),
             decode_head=dict(channels=32, dropout_ratio=0.0, norm_cfg=dict(_delete_=True, type='GN', num_groups=4)),
             auxiliary_head=dict(channels=32, dropout_ratio=0.0, norm_cfg=dict(_delete_=True, type='GN', num_groups=4)))
small = dict(type='Resize', scale=(128, 128), keep_ratio=False)
load = dict(type='LoadAnnotations', reduce_zero_label=True)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    indices=8, pipeline=[dict(type='LoadImageFromFile'), load, small, dict(type='PackSegInputs')]))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(
    indices=4, pipeline=[dict(type='LoadImageFromFile'), small, load, dict(type='PackSegInputs')]))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(checkpoint=dict(interval=2))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.01, weight_decay=0.0))
param_scheduler = []
randomness = dict(seed=0)
"""


def run(tool, *arguments, folder, data, processes=1, port=''):
    """Run train or test on the CPU, by the shell where there are more processes; the output."""
    # One thread each, as torchrun has it: sums in another order could tip untrained maps.
    environment = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '',
        'PYTHON': sys.executable,
        'PORT': port,
    }
    command = [sys.executable, ROOT / 'tools' / f'{tool}.py', *arguments]
    if processes > 1:
        config_and_checkpoint = 1 + (tool == 'test')
        command = [
            'bash',
            ROOT / 'tools' / f'dist_{tool}.sh',
            *arguments[:config_and_checkpoint],
            processes,
            *arguments[config_and_checkpoint:],
        ]
    result = subprocess.run(
        [*map(str, command), '--data-root', str(DATA / data)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def score(output, name):
    return re.findall(rf'{name}: (\d+\.\d+)', output)[-1]


@needs_data
def test_a_detector_trains_resumes_and_tests_alike_on_two_processes(tmp_path, port):
    config = tmp_path / 'config.py'
    config.write_text(DETECTION)
    run(
        'train',
        config,
        '--work-dir',
        'a',
        '--amp',
        '--cfg-options',
        'train_cfg.max_epochs=1',
        folder=tmp_path,
        data='coco_tiny',
    )
    resumed = run('train', config, '--work-dir', 'a', '--resume', folder=tmp_path, data='coco_tiny')
    assert 'resumed epoch: 1, iter: 3' in resumed and 'loss: nan' not in resumed
    one = run(
        'test', config, 'a/epoch_2.pth', '--out', 'one.pkl', '--show-dir', 'drawn', folder=tmp_path, data='coco_tiny'
    )
    two = run(
        'test', config, 'a/epoch_2.pth', '--out', 'two.pkl', folder=tmp_path, data='coco_tiny', processes=2, port=port
    )
    for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert score(one, name) == score(two, name) == score(resumed, name)
    assert '| person ' in one
    assert len(list((tmp_path / 'drawn').glob('*.jpg'))) == 4
    predictions = [pickle.loads((tmp_path / name).read_bytes()) for name in ('one.pkl', 'two.pkl')]
    for first, second in zip(*predictions, strict=True):
        assert len(first['pred_instances']['scores']) == 5
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(first['pred_instances'][key], second['pred_instances'][key])


@needs_data
def test_a_detector_trains_from_imagenet_weights_on_two_processes(tmp_path, port):
    config = tmp_path / 'config.py'
    config.write_text(DETECTION)
    torch.save({'state_dict': OverLoCK('xt').state_dict()}, tmp_path / 'imagenet.pth')
    trained = run(
        'train',
        config,
        '--work-dir',
        'a',
        '--weights',
        'imagenet.pth',
        '--cfg-options',
        'train_cfg.max_epochs=1',
        folder=tmp_path,
        data='coco_tiny',
        processes=2,
        port=port,
    )
    # 1549 tensors of the trunk; the log is the first process's.
    assert trained.count('loaded 1549 tensors from imagenet.pth') == 1
    weights = torch.load(tmp_path / 'a' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert all(value.isfinite().all() for value in weights.values())


@needs_data
def test_a_segmenter_trains_and_tests_alike_on_two_processes(tmp_path, port):
    config = tmp_path / 'config.py'
    config.write_text(SEGMENTATION)
    trained = run('train', config, '--work-dir', 'one', folder=tmp_path, data='ade_tiny')
    run(
        'train',
        config,
        '--work-dir',
        'two',
        '--cfg-options',
        'train_dataloader.batch_size=1',
        folder=tmp_path,
        data='ade_tiny',
        processes=2,
        port=port,
    )
    weights = [torch.load(tmp_path / name / 'iter_4.pth', weights_only=False)['state_dict'] for name in ('one', 'two')]
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    middle = torch.load(tmp_path / 'one' / 'iter_2.pth', weights_only=False)['state_dict']
    assert (weights[0]['decode_head.conv_seg.weight'] - middle['decode_head.conv_seg.weight']).abs().max() > 1e-3
    resumed = run('train', config, '--work-dir', 'one', '--resume', 'one/iter_2.pth', folder=tmp_path, data='ade_tiny')
    assert 'resumed epoch: 0, iter: 2' in resumed
    again = torch.load(tmp_path / 'one' / 'iter_4.pth', weights_only=False)['state_dict']
    torch.testing.assert_close(again, weights[0])
    one = run(
        'test', config, 'one/iter_4.pth', '--out', 'one.pkl', '--show-dir', 'drawn', folder=tmp_path, data='ade_tiny'
    )
    two = run(
        'test', config, 'one/iter_4.pth', '--out', 'two.pkl', folder=tmp_path, data='ade_tiny', processes=2, port=port
    )
    assert score(one, 'mIoU') == score(two, 'mIoU') == score(trained, 'mIoU')
    assert re.search(r'\|\s+person\s+\|', one)
    assert len(list((tmp_path / 'drawn').rglob('*.png'))) == 4
    predictions = [pickle.loads((tmp_path / name).read_bytes()) for name in ('one.pkl', 'two.pkl')]
    for first, second in zip(*predictions, strict=True):
        assert (first['pred_sem_seg'] == second['pred_sem_seg']).all()
