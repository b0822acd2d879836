"""The tools on photographs, with the smallest network at a small scale.

`OVERLOCK_DATA` names the folder that holds `coco_tiny` and `ade_tiny`, a few images in COCO's and ADE20K's layouts.
"""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from pycocotools.mask import area

from benchmarks.detectors import confide
from mmengine_overlock.config import load_config
from mmengine_overlock.predict import build_model
from overlock import OverLoCK
from tests.testing import ROOT, randomise

DATA = Path(os.environ.get('OVERLOCK_DATA', 'not set'))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DATA / 'coco_tiny').is_dir() or not (DATA / 'ade_tiny').is_dir(),
        reason='OVERLOCK_DATA does not name a folder with coco_tiny and ade_tiny',
    ),
]

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
val_evaluator = [{{{{_base_.val_evaluator}}}}, dict(type='DumpDetResults', out_file_path='val.pkl')]
train_cfg = dict(max_epochs=2, val_interval=1)
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


@pytest.fixture
def run(tmp_path, monkeypatch, port, run_tool, start_tool):
    """Run train or test in a folder of its own, on two processes where asked for; mmengine's output."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    # As torchrun has it: sums in another order could tip untrained maps.
    torch.set_num_threads(1)

    def run(tool, *arguments, processes=1):
        arguments = (*arguments, '--verbose')
        if processes == 1:
            code, out, err = run_tool(tool, *arguments)
        else:
            inputs = 1 + (tool == 'test')
            arguments = (*arguments[:inputs], processes, *arguments[inputs:])
            result = start_tool(f'dist_{tool}.sh', *arguments, PORT=port)
            code, out, err = result.returncode, result.stdout, result.stderr
        assert code == 0, out + err
        return out

    yield run
    torch.set_num_threads(threads)


def score(output, name):
    return re.findall(rf'{name}: (\d+\.\d+)', output)[-1]


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def predictions(*paths):
    return zip(*(pickle.loads(Path(path).read_bytes()) for path in paths), strict=True)


def test_a_detector_trains_from_imagenet_weights_on_two_processes_and_tests_and_resumes_on_one(run):
    config, data = Path('config.py'), ('--data-root', DATA / 'coco_tiny')
    config.write_text(DETECTION)
    torch.save({'state_dict': OverLoCK('xt').state_dict()}, 'imagenet.pth')
    options = ('--work-dir', 'a', '--weights', 'imagenet.pth', '--cfg-options', 'train_cfg.max_epochs=1')
    trained = run('train', config, *data, *options, processes=2)
    # 1549 tensors of the trunk; the log is the first process's.
    assert trained.count('loaded 1549 tensors from imagenet.pth') == 1
    assert all(value.isfinite().all() for value in weights('a/epoch_1.pth').values())

    tested = run('test', config, 'a/epoch_1.pth', *data, '--out', 'test.pkl', '--show-dir', 'drawn')
    for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert score(tested, name) == score(trained, name)
    assert '| person ' in tested
    assert len(list(Path('drawn').glob('*.jpg'))) == 4
    for one, two in predictions('test.pkl', 'val.pkl'):
        assert len(one['pred_instances']['scores']) == 5
        for key in ('bboxes', 'scores', 'labels'):
            torch.testing.assert_close(one['pred_instances'][key], two['pred_instances'][key])

    resumed = run('train', config, *data, '--work-dir', 'a', '--resume', '--amp')
    assert 'resumed epoch: 1, iter: 2' in resumed and 'Epoch(val) [2][4/4]' in resumed and 'loss: nan' not in resumed


def test_a_tuned_detector_has_the_average_precision_of_the_model_as_built(run):
    config, data = Path('config.py'), ('--data-root', DATA / 'coco_tiny', '--no-check')
    # Scores are those of sure heads.
    config.write_text(DETECTION.replace('score_thr=0.0, max_per_img=5', 'score_thr=0.05, max_per_img=20'))
    model = randomise(build_model(load_config(config)))
    confide(model)
    torch.save({'state_dict': model.state_dict()}, 'random.pth')
    run('test', config, 'random.pth', *data, '--out', 'found.pkl')
    # Random weights find none of the labelled objects: what the model as built finds is the truth.
    names = json.loads((DATA / 'coco_tiny/annotations/instances_val2017.json').read_text())
    truth = []
    for image in pickle.loads(Path('found.pkl').read_bytes()):
        found = image['pred_instances']
        for box, label, mask in zip(found['bboxes'].tolist(), found['labels'].tolist(), found['masks'], strict=True):
            place = dict(bbox=[*box[:2], box[2] - box[0], box[3] - box[1]], area=int(area(mask)), iscrowd=0)
            mask = dict(mask, counts=mask['counts'].decode())
            category = dict(category_id=names['categories'][label]['id'], image_id=image['img_id'])
            truth.append(dict(id=len(truth) + 1, segmentation=mask, **place, **category))
    Path('truth.json').write_text(json.dumps(dict(names, annotations=truth)))
    truth = f'test_evaluator.ann_file={Path("truth.json").resolve()}'
    built, tuned = (
        run('test', config, 'random.pth', *data, *fast, '--cfg-options', truth) for fast in ((), ('--fast',))
    )
    for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert float(score(built, name)) > 0.5
        assert abs(float(score(tuned, name)) - float(score(built, name))) <= 1e-4


def test_a_segmenter_trains_and_tests_alike_on_two_processes(run):
    config, data = Path('config.py'), ('--data-root', DATA / 'ade_tiny')
    config.write_text(SEGMENTATION)
    trained = run('train', config, *data, '--work-dir', 'one')
    options = ('--work-dir', 'two', '--cfg-options', 'train_dataloader.batch_size=1')
    run('train', config, *data, *options, processes=2)
    last, middle = weights('one/iter_4.pth'), weights('one/iter_2.pth')
    torch.testing.assert_close(weights('two/iter_4.pth'), last, rtol=1e-5, atol=1e-6)
    assert (last['decode_head.conv_seg.weight'] - middle['decode_head.conv_seg.weight']).abs().max() > 1e-3

    resumed = run('train', config, *data, '--work-dir', 'one', '--resume', 'one/iter_2.pth')
    assert 'resumed epoch: 0, iter: 2' in resumed
    torch.testing.assert_close(weights('one/iter_4.pth'), last)

    one = run('test', config, 'one/iter_4.pth', *data, '--out', 'one.pkl', '--show-dir', 'drawn')
    two = run('test', config, 'one/iter_4.pth', *data, '--out', 'two.pkl', processes=2)
    assert score(one, 'mIoU') == score(two, 'mIoU') == score(trained, 'mIoU')
    assert re.search(r'\|\s+person\s+\|', one)
    assert len(list(Path('drawn').rglob('*.png'))) == 4
    for first, second in predictions('one.pkl', 'two.pkl'):
        assert (first['pred_sem_seg'] == second['pred_sem_seg']).all()
