"""The configurations of this package on folders of one's own data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.registry import DATASETS, MODELS, DefaultScope

from mmengine_overlock.config import load_config, nodes
from mmengine_overlock.data import check_data
from mmengine_overlock.own_data import find_folder, fit_training, use_own_data
from mmengine_overlock.run import train
from overlock.cli.configs import copy_config
from overlock.utils.errors import UserError
from tests.mmengine_overlock.test_data_folders import NAMES, write, write_masks
from tests.mmengine_overlock.test_deploy import CONFIGS
from tests.testing import ROOT

CLASSES = ('Hund', '猫 cat', 'پرنده')
FILES = ['annotations/instances_train2017.json', 'annotations/instances_val2017.json']
ROBOFLOW = ['train/_annotations.coco.json', 'valid/_annotations.coco.json']
DETECTORS = ['mask_rcnn_overlock_t_1x', 'cascade_overlock_s_3x', 'retinanet_moganet_xt_1x']
HEADS = [('bbox_head', 'fc_cls', 4), ('mask_head', 'conv_logits', 3)]
CASCADE = [(f'{name}.{stage}.{layer}', outputs) for name, layer, outputs in HEADS for stage in range(3)]
SEGMENTERS = ['upernet_overlock_t_160k', 'fpn_moganet_s_80k']


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Give a configuration a folder of data, as training does."""
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path / 'cache'))

    def apply(config, options=None, **folder):
        cfg = load_config(config, options, tmp_path / 'work')
        found = find_folder(**{'coco': None, 'masks': None, **folder})
        use_own_data(cfg, found, options)
        fit_training(cfg, found, options)
        return cfg

    return apply


@pytest.fixture
def told(monkeypatch):
    """What the user is told."""
    lines = []
    monkeypatch.setattr('mmengine_overlock.own_data.tell', lambda message, *_: lines.append(message))
    return lines


def outputs_of(cfg):
    """The number of classes of each head of a model, as built."""
    settings = {
        name: cfg.model[name]
        for name in ('roi_head', 'bbox_head', 'decode_head', 'auxiliary_head')
        if name in cfg.model
    }
    settings.get('roi_head', {}).update(
        train_cfg=cfg.model.train_cfg.get('rcnn'), test_cfg=cfg.model.test_cfg.get('rcnn')
    )
    found = []
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for node in settings.values():
            head = MODELS.build(node)
            for name, layer in head.named_modules():
                if name.rpartition('.')[2] in ('fc_cls', 'conv_logits', 'retina_cls', 'conv_seg'):
                    found.append((name, getattr(layer, 'out_features', getattr(layer, 'out_channels', None))))
    return found


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        ('mask_rcnn_overlock_t_1x', [('bbox_head.fc_cls', 4), ('mask_head.conv_logits', 3)]),
        ('cascade_overlock_s_3x', CASCADE),
        ('retinanet_moganet_xt_1x', [('retina_cls', 9 * 3)]),
        ('upernet_overlock_t_160k', [('conv_seg', 4), ('conv_seg', 4)]),
        ('fpn_moganet_s_80k', [('conv_seg', 4)]),
    ],
)
def test_heads_data_sets_and_evaluators_get_the_classes_of_the_folder(own, tmp_path, config, expected):
    if config in SEGMENTERS:
        cfg = own(config, masks=write_masks(tmp_path / 'data'))
        classes = ('class 0', 'class 1', 'class 2', 'class 3')
    else:
        cfg = own(config, coco=write(tmp_path / 'data', FILES, ['train2017', 'val2017']))
        classes = CLASSES
    assert sorted(outputs_of(cfg)) == sorted(expected)
    assert check_data(cfg, 'train', 'val', 'test').keys() == {'train', 'val', 'test'}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for split in ('train', 'val', 'test'):
            settings = cfg[f'{split}_dataloader'].dataset
            dataset = DATASETS.build(dict(settings, filter_cfg=None))
            assert dataset.metainfo['classes'] == classes and len(dataset.metainfo['palette']) == len(classes)
            assert len(dataset) == (3 if config in DETECTORS else 2)
            if config in DETECTORS:
                # In the file: 7, 3, 900.
                assert [dataset.get_data_info(index)['instances'][0]['bbox_label'] for index in range(3)] == [1, 0, 2]
    if config in DETECTORS:
        metric = ['bbox'] if 'retinanet' in config else ['bbox', 'segm']
        assert cfg.val_evaluator.metric in (metric, *metric)
        assert cfg.test_evaluator.ann_file.startswith(str(tmp_path))


@pytest.mark.parametrize('config', DETECTORS[:2])
def test_boxes_without_masks_leave_the_mask_head_out(own, tmp_path, config):
    cfg = own(config, coco=write(tmp_path / 'data', ROBOFLOW, ['train', 'valid'], masks=False))
    assert {name for name, _ in outputs_of(cfg)}.isdisjoint({'mask_head.conv_logits', 'mask_head.0.conv_logits'})
    assert not any(node.get('with_mask') or node.get('pad_mask') for node in nodes([cfg.model, cfg.train_dataloader]))
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == ['bbox']
    found = check_data(cfg, 'train', 'val', 'test')
    assert not any(record.kind == 'mask' for records in found.values() for record in records)
    # The configuration that the run writes is the whole one.
    cfg.dump(tmp_path / 'dumped.py')
    assert load_config(tmp_path / 'dumped.py', work_dir=cfg.work_dir).to_dict() == cfg.to_dict()


def test_names_at_value_1_make_0_unlabeled(own, tmp_path):
    write_masks(tmp_path / 'data', values=(0, 1, 2, 3))
    (tmp_path / 'data/classes.json').write_text('{"1": "路", "2": "небо", "3": "tree"}', encoding='utf-8')
    cfg = own('upernet_overlock_t_160k', masks=tmp_path / 'data')
    assert cfg.model.decode_head.num_classes == 3 and cfg.train_dataloader.dataset.reduce_zero_label
    assert not any(record.outcome == 'refused' for record in check_data(cfg, 'train')['train'])


@pytest.mark.parametrize(
    ('config', 'folder', 'said'),
    [
        ('upernet_overlock_t_160k', 'coco', "--coco is for detectors, with default_scope = 'mmdet'"),
        ('mask_rcnn_overlock_t_1x', 'masks', "--masks is for segmenters, with default_scope = 'mmseg'"),
    ],
)
def test_a_configuration_of_the_other_task_is_told(own, tmp_path, config, folder, said):
    root = write(tmp_path, FILES, ['train2017', 'val2017'])
    write_masks(tmp_path)
    with pytest.raises(UserError, match=said):
        own(config, **{folder: root})


def test_what_cannot_be_replaced_is_told(own, tmp_path, told):
    root = write(tmp_path / 'data', FILES, ['train2017', 'val2017'], masks=False)
    with pytest.raises(UserError, match='val_evaluator of .* has no CocoMetric'):
        own('mask_rcnn_overlock_t_1x', {'val_evaluator.type': 'VOCMetric'}, coco=root)
    cfg = load_config('mask_rcnn_overlock_t_1x')
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[cfg.train_dataloader.dataset] * 2)
    with pytest.raises(UserError, match='has 2 data sets with a pipeline, expected one'):
        use_own_data(cfg, find_folder(root, None))
    with pytest.raises(UserError, match='--coco a and by --masks b; give one'):
        find_folder('a', 'b')
    cfg = load_config('mask_rcnn_overlock_t_1x')
    cfg.val_evaluator = [cfg.val_evaluator, dict(type='LVISMetric')]
    use_own_data(cfg, find_folder(root, None))
    assert (
        cfg.val_evaluator.type == 'CocoMetric' and 'val_evaluator keeps CocoMetric alone, without LVISMetric.' in told
    )
    cfg.model = dict(type='SOLO', mask_head=dict(type='SOLOHead'))
    with pytest.raises(UserError, match='have no masks, and SOLO finds nothing else'):
        use_own_data(cfg, find_folder(root, None))
    cfg.model = dict(type='DETR')
    with pytest.raises(UserError, match='DETR has none of the heads bbox_head'):
        use_own_data(cfg, find_folder(root, None))


def test_without_the_check_categories_must_be_in_order(tmp_path):
    root = write(tmp_path / 'data', FILES, ['train2017', 'val2017'])
    with pytest.raises(UserError, match='leave out --no-check'):
        find_folder(root, None, check=False)
    ordered = write(tmp_path / 'ordered', FILES, ['train2017', 'val2017'], names=dict(sorted(NAMES.items())))
    assert find_folder(ordered, None, check=False).classes == CLASSES


def test_learning_rate_and_warm_up_follow_the_data_and_are_told(own, tmp_path, told, monkeypatch):
    root = write(tmp_path / 'data', FILES, ['train2017', 'val2017'])
    cfg = own('mask_rcnn_overlock_t_1x', coco=root)
    assert cfg.auto_scale_lr.enable and [step.end for step in cfg.param_scheduler] == [3, 12]
    assert told == [
        f'Data in {root}: 3 classes (Hund, 猫 cat, پرنده), labeled images 3 for train, 3 for val.',
        'Learning rate 2.5e-05 for 2 images a step, from 0.0002 for 16.',
        'Warm-up of 2 iterations instead of 500, as the training has 24.',
    ]
    monkeypatch.setenv('WORLD_SIZE', '4')
    cfg = load_config('mask_rcnn_overlock_t_1x', {'train_dataloader.batch_size': 1}, launcher='pytorch')
    cfg.pop('auto_scale_lr')
    fit_training(cfg, find_folder(root, None))
    assert told[3:] == [
        'Learning rate 0.0002, not scaled to 4 images a step, as the configuration has no '
        'auto_scale_lr.base_batch_size.',
        'Warm-up of 1 iterations instead of 500, as the training has 12.',
    ]


def test_repeated_data_and_updates_of_several_steps_are_counted_and_told(tmp_path, told):
    found = find_folder(write(tmp_path / 'data', FILES, ['train2017', 'val2017']), None)
    cfg = load_config('mask_rcnn_overlock_t_1x', {'optim_wrapper.accumulative_counts': 8})
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=10, dataset=cfg.train_dataloader.dataset)
    use_own_data(cfg, found)
    fit_training(cfg, found)
    assert told[-2].startswith('An update takes 8 steps, which this learning rate does not count; give another')
    assert told[-1] == 'Warm-up of 18 iterations instead of 500, as the training has 180.'


def test_settings_that_were_given_stay(own, tmp_path, told):
    root = write_masks(tmp_path / 'data')
    options = {
        'optim_wrapper.optimizer.lr': 1e-3,
        'train_cfg.max_iters': 900,
        'param_scheduler.0.end': 301,
        'train_dataloader.dataset.img_suffix': '.jpeg',
    }
    cfg = own('upernet_overlock_t_160k', options, masks=root)
    assert cfg.train_dataloader.dataset.img_suffix == '.jpeg' and cfg.val_dataloader.dataset.img_suffix == '.jpg'
    assert not cfg.auto_scale_lr.enable and cfg.param_scheduler[0].end == 301
    assert told[-2] == 'Learning rate 0.001, not scaled to 2 images a step, as given.'
    assert told[-1].startswith('The learning rate stops on its way: PolyLR ends at 160001, the training at 900; give ')
    assert told[-1].endswith(' --cfg-options param_scheduler.1.end=900 to end with it.')
    options = {'train_cfg.max_iters': 900, 'param_scheduler.1.end': 901}
    # What was given for another one leaves the warm-up free.
    assert [step.end for step in own('upernet_overlock_t_160k', options, masks=root).param_scheduler] == [91, 901]
    cfg = own('upernet_overlock_t_160k', {'auto_scale_lr.enable': False}, masks=root)
    assert not cfg.auto_scale_lr.enable
    cfg = own('upernet_overlock_t_160k', masks=root)
    assert cfg.auto_scale_lr.enable
    assert [step.end for step in cfg.param_scheduler] == [1501, 160001]


def test_steps_that_a_shorter_training_does_not_reach_are_told(own, tmp_path, told):
    root = write(tmp_path / 'data', FILES, ['train2017', 'val2017'])
    own('mask_rcnn_overlock_t_1x', {'train_cfg.max_epochs': 6}, coco=root)
    assert told[-1] == (
        'The learning rate stops on its way: MultiStepLR ends at 12, the training at 6; give --cfg-options '
        'param_scheduler.1.end=6 param_scheduler.1.milestones="[4,5]" to end with it.'
    )


def test_a_given_rate_is_scaled_where_that_is_asked_for_and_told_so(tmp_path, told, monkeypatch):
    found = {}

    def stop(cfg, *splits):
        found.update(cfg.auto_scale_lr)
        raise UserError('enough')

    monkeypatch.setattr('mmengine_overlock.run.check_data', stop)
    root = write(tmp_path / 'data', FILES, ['train2017', 'val2017'])
    options = {'optim_wrapper.optimizer.lr': 1e-3}
    with pytest.raises(UserError, match='enough'):
        train('mask_rcnn_overlock_t_1x', work_dir=tmp_path / 'w', coco=root, auto_scale_lr=True, cfg_options=options)
    assert found['enable'] and 'Learning rate 0.000125 for 2 images a step, from 0.001 for 16.' in told


SMALL = {
    'detector': """
steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True), small]
train_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(
    filter_cfg=dict(min_size=8), pipeline=[*steps, dict(type='PackDetInputs')]))
val_dataloader = test_dataloader
train_cfg = dict(max_epochs=1)
""",
    'segmenter': """
model['data_preprocessor'] = dict(size=(64, 64))
steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='Resize', scale=(64, 64))]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(
    pipeline=[*steps, dict(type='PackSegInputs')]))
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_iters=2, val_interval=2)
""",
}


@pytest.mark.slow
@pytest.mark.parametrize('kind', SMALL)
def test_own_data_is_trained_tested_and_predicted_by_three_commands(kind, tmp_path):
    config = tmp_path / 'own.py'
    text = CONFIGS[kind].replace('model = dict(backbone=dict(', 'model = dict(backbone=dict(init_cfg=None, ')
    config.write_text(text + SMALL[kind])
    root = tmp_path / 'own data'
    if kind == 'detector':
        write(root, ROBOFLOW, ['train', 'valid'], masks=False)
    else:
        write_masks(root)

    def overlock(*arguments):
        given = dict(
            os.environ,
            PYTHONPATH=str(ROOT),
            OVERLOCK_CACHE=str(tmp_path / 'cache'),
            CUDA_VISIBLE_DEVICES='',
            OMP_NUM_THREADS='1',
        )
        command = [sys.executable, '-m', 'overlock', *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    overlock('train', config, '--coco' if kind == 'detector' else '--masks', root, '--work-dir', 'work')
    checkpoint = 'work/epoch_1.pth' if kind == 'detector' else 'work/iter_2.pth'
    scores = overlock('test', 'work/own.py', checkpoint)
    assert re.search(r'\n  bbox +mAP ' if kind == 'detector' else r'\bmIoU \d', scores) and 'segm' not in scores
    image = root / ('valid' if kind == 'detector' else 'images/val') / '1.jpg'
    overlock('predict', image, '--checkpoint', checkpoint, '--out', 'out', '--score', 0, '--device', 'cpu')
    if kind == 'detector':
        found = json.loads((tmp_path / 'out/predictions.json').read_text())
        assert found and {box['category_name'] for box in found} <= set(CLASSES)
    else:
        assert json.loads((tmp_path / 'out/labels.json').read_text()) == {str(n): f'class {n}' for n in range(4)}


def test_the_configurations_of_the_readme_fit_their_data(tmp_path, monkeypatch):
    detector, segmenter = re.findall(r'```python\n(_base_.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
    assert [text.count('\n') for text in (detector, segmenter)] == [13, 12]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path / 'cache'))
    files = ['annotations/train.json', 'annotations/val.json']
    write(Path('data/animals'), files, ['train', 'val'], names={1: 'cat', 2: 'dog', 3: 'bird'})
    write_masks(Path('data/streets'), values=(0, 1, 2, 3))
    given = {
        'mask_rcnn_overlock_t_1x': (detector, dict(coco='data/animals', masks=None)),
        'upernet_overlock_t_160k': (segmenter, dict(coco=None, masks='data/streets')),
    }
    for name, (text, folder) in given.items():
        copy_config(name, Path())
        Path('own.py').write_text(text)
        cfg = load_config('own.py')
        assert not any(check_data(cfg, 'train', 'val', 'test').values())
        # As by the option.
        other = load_config(name)
        use_own_data(other, find_folder(**folder))
        assert cfg.model == other.model
        for split in ('train', 'val', 'test'):
            ours, theirs = (Path(c[f'{split}_dataloader'].dataset.data_root).absolute() for c in (cfg, other))
            assert ours == theirs
