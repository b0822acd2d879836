"""Programs to log to, early stopping and averaged weights, through interruptions."""

import shutil
from importlib.machinery import ModuleSpec
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import VISBACKENDS

from mmengine_overlock.config import load_config
from mmengine_overlock.run import train
from mmengine_overlock.training_options import add_backend, average_weights, stop_early
from overlock.checkpoint import CheckpointError
from overlock.utils.errors import UserError

pytestmark = pytest.mark.usefixtures('quick_saves')

# The same score at each validation.
PLATEAU = """
optim_wrapper['optimizer']['lr'] = 0.0
default_hooks['checkpoint'].update(save_best='error', rule='less')
"""


def resume(config, checkpoint, folder, **options):
    folder.mkdir()
    shutil.copy(checkpoint, folder)
    return train(config, work_dir=folder, resume='auto', **options)


@pytest.mark.parametrize('by_iteration', [False, True], ids=['epochs', 'iterations'])
def test_a_plateau_ends_the_run_and_a_resumed_one_at_the_same_place(write_toy, tmp_path, by_iteration):
    more = PLATEAU + ('train_cfg.update(val_interval=4)\n' if by_iteration else 'train_cfg.update(val_interval=1)\n')
    more += 'train_cfg.update(max_iters=40)\n' if by_iteration else 'train_cfg.update(max_epochs=10)\n'
    whole = train(write_toy(more, by_iteration), work_dir=tmp_path / 'whole', early_stop=2)
    # One that is the best, and two that are no better.
    name = 'iter_12' if by_iteration else 'epoch_3'
    assert whole.iter == (12 if by_iteration else 24) and (tmp_path / f'whole/{name}.pth').is_file()
    middle = tmp_path / ('whole/iter_8.pth' if by_iteration else 'whole/epoch_2.pth')
    resumed = resume(write_toy(more, by_iteration), middle, tmp_path / 'resumed', early_stop=2)
    assert resumed.iter == whole.iter
    again = resume(write_toy(more, by_iteration), tmp_path / f'whole/{name}.pth', tmp_path / 'again', early_stop=2)
    assert again.iter == whole.iter


def test_a_run_that_gets_better_goes_on(write_toy, tmp_path):
    more = PLATEAU.replace('0.0', '0.01') + 'train_cfg.update(val_interval=1)\n'
    assert train(write_toy(more), work_dir=tmp_path / 'a', early_stop=1).epoch == 4


def test_averaged_weights_are_saved_resumed_and_not_forgotten(write_toy, tmp_path):
    train(write_toy(), work_dir=tmp_path / 'whole', ema=True)
    resume(write_toy(), tmp_path / 'whole/epoch_2.pth', tmp_path / 'resumed', ema=True)
    early, last, resumed = (
        torch.load(tmp_path / path, weights_only=False)
        for path in ('whole/epoch_1.pth', 'whole/epoch_4.pth', 'resumed/epoch_4.pth')
    )
    for name in ('state_dict', 'ema_state_dict'):
        torch.testing.assert_close(resumed[name], last[name], rtol=0, atol=0)
    name = 'toy_head.weight'
    # mmengine keeps the weights that go on training beside the average, which is the model.
    average, raw, before = last['state_dict'][name], last['ema_state_dict'][f'module.{name}'], early['state_dict'][name]
    assert 0 < (average - raw).norm() < (average - before).norm()
    with pytest.raises(CheckpointError, match='running average of the weights; resume with --ema'):
        resume(write_toy(), tmp_path / 'whole/epoch_2.pth', tmp_path / 'other')


@pytest.mark.parametrize(
    'visualizer', [None, dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])]
)
def test_programs_that_log_are_added_once_beside_the_others(visualizer, monkeypatch):
    monkeypatch.setattr('mmengine_overlock.training_options.find_spec', lambda name: find_spec('json'))
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://server')
    cfg = Config(dict(visualizer=visualizer))
    for name in ('tensorboard', 'wandb', 'mlflow', 'tensorboard'):
        add_backend(cfg, name)
    backends = cfg.visualizer.vis_backends
    assert [VISBACKENDS.get(backend.type).__name__ for backend in backends] == [
        *('LocalVisBackend', 'TensorboardVisBackend', 'WandbVisBackend', 'MLflowVisBackend')
    ]
    assert backends[3].tracking_uri == 'http://server'
    # Of its own files MLflow takes a database alone.
    for change in (lambda name: monkeypatch.setenv(name, ''), monkeypatch.delenv):
        change('MLFLOW_TRACKING_URI')
        cfg = Config(dict(work_dir='/work dir'))
        add_backend(cfg, 'mlflow')
        assert cfg.visualizer.vis_backends[1].tracking_uri == 'sqlite:////work dir/mlflow.db'


@pytest.mark.parametrize('name', ['tensorboard', 'wandb', 'mlflow'])
def test_a_program_that_is_not_installed_is_one_sentence(name, monkeypatch):
    # As of a folder that another run has left.
    monkeypatch.setattr('mmengine_overlock.training_options.find_spec', lambda name: ModuleSpec(name, None))
    with pytest.raises(UserError, match=f'--{name} needs the package {name}, .* run: pip install {name}'):
        add_backend(Config({}), name)


def test_an_average_is_kept_once():
    cfg = Config(dict(custom_hooks=[dict(type='Other')]))
    average_weights(cfg)
    average_weights(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ['Other', 'EMAHook'] and cfg.custom_hooks[1].momentum == 0.0002


@pytest.mark.parametrize(
    ('hook', 'evaluator', 'score'),
    [
        (dict(save_best='coco/segm_mAP', rule='greater'), dict(type='CocoMetric'), 'coco/segm_mAP'),
        (dict(save_best='auto'), dict(type='CocoMetric', metric=['bbox', 'segm']), 'coco/bbox_mAP'),
        ({}, [dict(type='CocoMetric', metric='segm')], 'coco/segm_mAP'),
        ({}, dict(type='IoUMetric', iou_metrics=['mIoU']), 'mIoU'),
    ],
)
def test_early_stopping_watches_the_score_that_is_kept(hook, evaluator, score):
    hooks = dict(checkpoint=dict(type='CheckpointHook', **hook))
    cfg = Config(dict(val_cfg={'type': 'ValLoop'}, val_evaluator=evaluator, default_hooks=hooks))
    stop_early(cfg, 3)
    (stop,) = cfg.custom_hooks
    assert (stop.type, stop.monitor, stop.patience, stop.rule) == ('EarlyStopHook', score, 3, hook.get('rule'))
    assert cfg.default_hooks.checkpoint.save_best == hook.get('save_best', score)


def test_early_stopping_without_a_score_or_validations_is_one_sentence(write_toy):
    with pytest.raises(UserError, match='default_hooks.checkpoint.save_best=NAME'):
        stop_early(load_config(write_toy()), 3)
    with pytest.raises(UserError, match='at least 1, got 0'):
        stop_early(load_config(write_toy()), 0)
    with pytest.raises(UserError, match='--early-stop needs validations, and .* has no val_cfg'):
        stop_early(load_config(write_toy('val_cfg = val_dataloader = val_evaluator = None')), 1)
