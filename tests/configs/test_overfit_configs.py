"""The configurations that fit a handful of images, through the training tool."""

import json
import subprocess
import sys

import pytest

from tests.configs.testing import CONFIGS, build_meta, load_config


@pytest.mark.parametrize('name', ['mask_rcnn_overlock_xt_overfit', 'upernet_overlock_xt_overfit'])
def test_builds_and_validates_on_its_training_images(name):
    cfg = load_config(f'demo/{name}')
    build_meta(cfg)
    train, val = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    assert [val[key] for key in ('data_root', 'data_prefix')] == [train[key] for key in ('data_root', 'data_prefix')]
    if cfg.default_scope == 'mmdet':
        assert val.ann_file == train.ann_file
        assert cfg.val_evaluator.ann_file == val.data_root + val.ann_file


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'data', 'metric'),
    [
        ('mask_rcnn_overlock_xt_overfit', 'coco_root', 'coco/bbox_mAP'),
        ('upernet_overlock_xt_overfit', 'ade_root', 'mIoU'),
    ],
)
def test_trains_saves_and_scores_where_it_validates(name, data, metric, tmp_path, request):
    command = [
        sys.executable,
        CONFIGS.parent / 'tools/train.py',
        CONFIGS / f'demo/{name}.py',
        '--data-root',
        request.getfixturevalue(data),
        '--work-dir',
        tmp_path,
        '--cfg-options',
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=1',
        'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1',
        'default_hooks.checkpoint.interval=2',
    ]
    if data == 'coco_root':
        # Without detections there is no AP to log.
        command += ['model.test_cfg.rcnn.score_thr=0.0']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / 'iter_2.pth').is_file()
    scalars = [json.loads(line) for line in next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    assert [line['step'] for line in scalars if metric in line] == [1, 2]
    assert [line['step'] for line in scalars if 'loss' in line] == [1, 2]
