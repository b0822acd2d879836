import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook

from mmengine_overlock import run
from mmengine_overlock.run import test as run_test
from mmengine_overlock.run import train
from mmengine_overlock.speed import TuneHook
from overlock.checkpoint import WEIGHTS, CheckpointError
from overlock.utils.errors import UserError


def history(runner, name):
    return runner.message_hub.get_scalar(name).data[0]


@pytest.mark.parametrize('by_iteration, middle', [(False, 'epoch_2.pth'), (True, 'iter_4.pth')])
def test_a_resumed_run_equals_an_uninterrupted_one(write_toy, tmp_path, by_iteration, middle):
    whole = train(write_toy(by_iteration=by_iteration), work_dir=tmp_path / 'whole')
    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'whole' / middle, tmp_path / 'resumed')
    resumed = train(write_toy(by_iteration=by_iteration), work_dir=tmp_path / 'resumed', resume='auto')
    assert (resumed.iter, resumed.epoch) == (whole.iter, whole.epoch)
    assert len(history(whole, 'train/loss')) == whole.iter
    for name in ('train/loss', 'train/lr'):
        np.testing.assert_array_equal(history(resumed, name), history(whole, name))
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.optim_wrapper.state_dict(), whole.optim_wrapper.state_dict(), rtol=0, atol=0)


def test_published_weights_are_tested_by_their_name(write_toy, tmp_path, monkeypatch):
    train(write_toy(), work_dir=tmp_path / 'a')
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path / 'a'))
    monkeypatch.setitem(
        WEIGHTS, 'toy', replace(WEIGHTS['upernet_overlock_t_ade20k'], url='https://example.invalid/v1/epoch_4.pth')
    )
    scores = [
        run_test(write_toy(), checkpoint, work_dir=tmp_path / 'b')
        for checkpoint in ('toy', 'https://example.invalid/v1/epoch_4.pth', str(tmp_path / 'a' / 'epoch_4.pth'))
    ]
    assert scores[0] == scores[1] == scores[2]


def test_resume_goes_on_with_the_seed_of_the_first_run(write_toy, tmp_path):
    first = train(write_toy('randomness = dict(seed=None)'), work_dir=tmp_path / 'a')
    resumed = train(
        write_toy('randomness = dict(seed=None)'), work_dir=tmp_path / 'b', resume=str(tmp_path / 'a' / 'epoch_2.pth')
    )
    assert resumed.seed == first.seed


def test_auto_resume_of_an_empty_folder_starts_anew(write_toy, tmp_path):
    assert train(write_toy(), work_dir=tmp_path / 'a', resume='auto').iter == 32


def test_auto_resume_goes_round_a_cut_off_checkpoint(write_toy, tmp_path):
    whole = train(write_toy(), work_dir=tmp_path / 'a')
    last = Path((tmp_path / 'a' / 'last_checkpoint').read_text())
    assert last.name == 'epoch_4.pth'
    last.write_bytes(last.read_bytes()[:-100])
    resumed = train(write_toy(), work_dir=tmp_path / 'a', resume='auto')
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_resume_does_not_ask_for_pretrained_weights_again(write_toy, tmp_path):
    train(write_toy(), work_dir=tmp_path / 'a')
    path = write_toy("model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint='/absent.pth')")
    with pytest.raises(CheckpointError, match='/absent.pth'):
        train(path, work_dir=tmp_path / 'b')
    resumed = train(
        path,
        work_dir=tmp_path / 'b',
        resume=str(tmp_path / 'a' / 'epoch_2.pth'),
        cfg_options=dict(experiment_name='resumed'),
    )
    assert resumed.iter == 32
    assert Config.fromfile(tmp_path / 'b' / path.name).model.backbone.init_cfg.checkpoint == '/absent.pth'


def test_resume_refuses_a_checkpoint_of_another_model(write_toy, tmp_path):
    train(write_toy(), work_dir=tmp_path / 'a')
    with pytest.raises(CheckpointError, match='is not for this model: 3 tensors of another shape'):
        train(write_toy(), work_dir=tmp_path / 'a', resume='auto', cfg_options={'model.backbone.width': 9})


def test_a_missing_checkpoint_is_one_sentence(write_toy):
    for call in (
        lambda: train(write_toy(), resume='absent.pth'),
        lambda: run_test(write_toy(), 'absent.pth'),
        lambda: train(write_toy("load_from = 'absent.pth'")),
    ):
        with pytest.raises(CheckpointError, match='The weight file absent.pth does not exist'):
            call()


def test_training_from_weights_starts_the_backbone_from_them(write_toy, tmp_path):
    weights = tmp_path / 'w.pth'
    expected = {'fc.weight': torch.full((8, 4), 0.5), 'fc.bias': torch.zeros(8)}
    torch.save(expected, weights)
    runner = train(write_toy("optim_wrapper['optimizer']['lr'] = 0.0"), weights=str(weights))
    torch.testing.assert_close(dict(runner.model.backbone.state_dict()), expected)


def test_training_tunes_the_model(write_toy, monkeypatch):
    tuned = []
    monkeypatch.setattr(run, 'tune_for_training', tuned.append)
    assert tuned == [train(write_toy()).model]


def test_auto_scale_lr_scales_with_the_batch_size(write_toy):
    path = write_toy('auto_scale_lr = dict(enable=False, base_batch_size=8)')
    assert history(train(path), 'train/lr')[0] == 0.01
    scaled = train(path, auto_scale_lr=True, cfg_options=dict(experiment_name='scaled'))
    assert history(scaled, 'train/lr')[0] == pytest.approx(0.01 * 2 / 8)


def test_tensorboard_gets_the_scalars(write_toy, tmp_path):
    runner = train(write_toy(), work_dir=tmp_path / 'a', tensorboard=True)
    assert list(Path(runner.log_dir).glob('vis_data/events.out.tfevents.*'))
    assert list(Path(runner.log_dir).glob('vis_data/scalars.json'))


def test_a_test_gives_the_metrics_of_the_validation(write_toy, tmp_path):
    runner = train(write_toy(), work_dir=tmp_path / 'a')
    metrics = run_test(write_toy(), str(tmp_path / 'a' / 'epoch_4.pth'))
    assert metrics == dict(error=history(runner, 'val/error')[-1], images=16)


def test_no_average_takes_the_place_of_tuned_weights(write_toy, tmp_path, monkeypatch):
    train(write_toy(), work_dir=tmp_path / 'a')
    hooks = []
    monkeypatch.setattr(TuneHook, 'before_test', lambda self, runner: hooks.extend(runner.hooks))
    average = write_toy("custom_hooks = [dict(type='EMAHook')]")
    run_test(average, str(tmp_path / 'a' / 'epoch_4.pth'), fast=True)
    assert hooks and not any(isinstance(hook, EMAHook) for hook in hooks)


@pytest.mark.parametrize(
    'change, misfit',
    [
        (
            dict(state_dict={'backbone.fc.weight': torch.zeros(9, 4)}),
            '1 tensor of another shape .first backbone.fc.weight.',
        ),
        (dict(state_dict={'more.weight': torch.zeros(1)}), '1 tensor that the model does not have .first more.weight.'),
        (dict(lacks='toy_head.'), '2 tensors missing from the file .first toy_head.weight.'),
    ],
)
def test_a_test_refuses_weights_that_do_not_fit_the_whole_model(write_toy, tmp_path, change, misfit):
    train(write_toy(), work_dir=tmp_path / 'a')
    path = tmp_path / 'a' / 'epoch_4.pth'
    state = torch.load(path, weights_only=False)['state_dict']
    state = {name: value for name, value in state.items() if not name.startswith(change.get('lacks', ' '))}
    torch.save(dict(state_dict={**state, **change.get('state_dict', {})}), path)
    with pytest.raises(CheckpointError, match=f'epoch_4.pth is not for this model: {misfit}'):
        run_test(write_toy(), str(path))


def test_an_interrupted_run_leaves_a_checkpoint_to_resume(write_toy, tmp_path, monkeypatch):
    replace = os.replace

    def interrupt(source, target):
        if Path(target).name == 'epoch_3.pth':
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, 'replace', interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(write_toy(), work_dir=tmp_path / 'a')
    monkeypatch.setattr(os, 'replace', replace)
    assert not (tmp_path / 'a' / 'epoch_3.pth').exists()
    resumed = train(write_toy(), work_dir=tmp_path / 'a', resume='auto')
    whole = train(write_toy(), work_dir=tmp_path / 'b')
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_an_unknown_launch_is_one_sentence(write_toy, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(UserError, match='--launcher pytorch needs .*RANK.* in the environment'):
        train(write_toy(), launcher='pytorch')
