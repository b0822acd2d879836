import random
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmengine_overlock.resume import SeededBatches, seed_all
from mmengine_overlock.run import train
from overlock.utils.errors import CheckpointError, UserError
from tests.toy import ToyDataset

# Every kind of state and of randomness, and a checkpoint after each iteration.
EVERYTHING = """
model['dropout'] = 0.3
train_dataloader['dataset'] = dict(type='ToyDataset', length=11, noise=0.5)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
default_hooks['checkpoint'] = dict(type='CheckpointHook', by_epoch=False, interval=1, save_best='error', rule='less')
"""
WORKERS = """
train_dataloader.update(num_workers=2, persistent_workers=True)
"""
BY_RATIO = """
train_dataloader.update(batch_sampler=dict(type='mmdet.AspectRatioBatchSampler'))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Formatting the configuration is nearly all the time that a small checkpoint takes."""
    monkeypatch.setattr(Config, 'pretty_text', '')


def saved(path):
    """What a checkpoint holds of the state of a run."""
    checkpoint = torch.load(path, weights_only=False)
    logs = checkpoint['message_hub']['log_scalars']
    state = {name: checkpoint[name] for name in ('state_dict', 'ema_state_dict', 'optimizer')}
    state['schedulers'] = [
        {name: value for name, value in scheduler.items() if name != 'param_name'}
        for scheduler in checkpoint['param_schedulers']
    ]
    losses = [list(map(float, logs[name].data[0])) for name in ('train/loss', 'train/lr')]
    return dict(state, losses=losses, best=checkpoint['message_hub']['runtime_info'].get('best_score'))


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def resume(config, folder, checkpoint):
    folder.mkdir()
    shutil.copy(checkpoint, folder)
    return train(config, work_dir=folder, resume='auto')


@pytest.mark.parametrize('more', ['', WORKERS, BY_RATIO, WORKERS + BY_RATIO], ids=['', 'workers', 'ratio', 'both'])
@pytest.mark.parametrize('by_iteration', [False, True], ids=['epochs', 'iterations'])
def test_a_run_resumed_at_any_iteration_ends_like_the_uninterrupted_one(write_toy, tmp_path, by_iteration, more):
    more = EVERYTHING + more + 'train_cfg.update(val_interval=3)\n'
    more += 'train_cfg.update(max_iters=14)\n' if by_iteration else 'train_cfg.update(max_epochs=3)\n'
    whole = train(write_toy(more, by_iteration), work_dir=tmp_path / 'whole')
    last = f'iter_{whole.iter}.pth'
    # At once, within a pass over the data, at its end, and after the last iteration.
    for iteration in (1, 5, 6, 8, 12, whole.iter):
        folder = tmp_path / str(iteration)
        resumed = resume(write_toy(more, by_iteration), folder, tmp_path / 'whole' / f'iter_{iteration}.pth')
        assert (resumed.iter, resumed.epoch) == (whole.iter, whole.epoch)
        assert_equal(saved(folder / last), saved(tmp_path / 'whole' / last))
        best, of_whole = ({path.name for path in where.glob('best_*')} for where in (folder, tmp_path / 'whole'))
        # A run that is resumed after its last validation writes no best checkpoint.
        assert len(of_whole) == 1 and best in (of_whole, set())


def test_finite_samplers_by_iteration_go_on_in_the_right_pass(write_toy, tmp_path):
    more = EVERYTHING + "train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=True)\n"
    train(write_toy(more, True), work_dir=tmp_path / 'whole')
    resume(write_toy(more, True), tmp_path / 'resumed', tmp_path / 'whole' / 'iter_7.pth')
    assert_equal(saved(tmp_path / 'resumed' / 'iter_12.pth'), saved(tmp_path / 'whole' / 'iter_12.pth'))


def test_workers_and_processes_read_what_one_process_reads(write_toy, tmp_path):
    for name, more in (('none', ''), ('two', WORKERS)):
        train(write_toy(EVERYTHING + more), work_dir=tmp_path / name)
    assert_equal(saved(tmp_path / 'two' / 'iter_24.pth'), saved(tmp_path / 'none' / 'iter_24.pth'))


@pytest.mark.parametrize('by_iteration', [False, True], ids=['epochs', 'iterations'])
def test_a_seed_that_was_not_configured_is_taken_up_again(write_toy, tmp_path, by_iteration):
    more = EVERYTHING + 'randomness = dict(seed=None)\n'
    whole = train(write_toy(more, by_iteration), work_dir=tmp_path / 'whole')
    resume(write_toy(more, by_iteration), tmp_path / 'resumed', tmp_path / 'whole' / 'iter_5.pth')
    last = f'iter_{whole.iter}.pth'
    assert_equal(saved(tmp_path / 'resumed' / last), saved(tmp_path / 'whole' / last))


def test_skipped_samples_are_not_read(write_toy, tmp_path, monkeypatch):
    read = []
    original = ToyDataset.__getitem__

    def reading(dataset, index):
        if dataset.noise:
            read.append(index)
        return original(dataset, index)

    monkeypatch.setattr(ToyDataset, '__getitem__', reading)
    for by_iteration in (False, True):
        whole = train(write_toy(EVERYTHING, by_iteration), work_dir=tmp_path / f'whole{by_iteration}')
        read.clear()
        folder = tmp_path / f'resumed{by_iteration}'
        resume(
            write_toy(EVERYTHING, by_iteration),
            folder,
            tmp_path / f'whole{by_iteration}' / f'iter_{whole.iter - 2}.pth',
        )
        assert len(read) in (3, 4)


def test_a_validation_that_did_not_end_is_repeated(write_toy, tmp_path):
    more = EVERYTHING + "train_cfg.update(val_interval=1)\ndefault_hooks['checkpoint'].update(by_epoch=True)\n"
    whole = train(write_toy(more), work_dir=tmp_path / 'whole')
    # As it was before the validation, which found a new best.
    checkpoint = torch.load(tmp_path / 'whole' / 'epoch_2.pth', weights_only=False)
    assert checkpoint['message_hub']['runtime_info'].pop('validated') == 2
    (tmp_path / 'resumed').mkdir()
    torch.save(checkpoint, tmp_path / 'resumed' / 'epoch_2.pth')
    resumed = train(write_toy(more), work_dir=tmp_path / 'resumed', resume='auto')
    for runner, validations in ((whole, 4), (resumed, 5)):
        assert len(runner.message_hub.get_scalar('val/error').data[0]) == validations
    assert_equal(saved(tmp_path / 'resumed' / 'epoch_4.pth'), saved(tmp_path / 'whole' / 'epoch_4.pth'))


def test_weights_alone_cannot_be_resumed(write_toy, tmp_path):
    train(write_toy(EVERYTHING + 'train_cfg.update(val_interval=1)\n'), work_dir=tmp_path / 'a')
    best = next((tmp_path / 'a').glob('best_*.pth'))
    with pytest.raises(CheckpointError, match='best_error_.* holds no optimizer, and no run can go on from it'):
        train(write_toy(EVERYTHING), work_dir=tmp_path / 'b', resume=str(best))


def test_an_epoch_of_another_length_cannot_be_resumed_in_its_middle(write_toy, tmp_path):
    train(write_toy(EVERYTHING), work_dir=tmp_path / 'a')
    more = EVERYTHING + "train_dataloader['batch_size'] = 1\n"
    with pytest.raises(UserError, match='saved within an epoch of 6 batches, and an epoch has 11 now'):
        train(write_toy(more), work_dir=tmp_path / 'b', resume=str(tmp_path / 'a' / 'iter_8.pth'))
    # At its end it can.
    assert train(write_toy(more), work_dir=tmp_path / 'c', resume=str(tmp_path / 'a' / 'iter_12.pth')).epoch == 4


def test_places_seed_all_generators_alike_and_differ_from_each_other():
    def draw(*place):
        seed_all(*place)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(0, 1, 2, 3) == draw(0, 1, 2, 3)
    drawn = [value for place in np.ndindex(3, 3, 3, 3) for value in draw(*place)]
    assert len(set(drawn)) == len(drawn)


def test_a_batch_sampler_gives_nothing_before_it_begins_and_ends_without_data():
    sampler = torch.utils.data.SequentialSampler([0] * 5)
    sampler.dataset = ToyDataset(5)
    batches = SeededBatches(sampler, 2)
    assert list(batches) == [] and len(batches) == 3
    batches.begin(seed=0, iteration=7, skip=1, endless=False)
    assert [[index for index, _ in batch] for batch in batches] == [[2, 3], [4]]
    sampler = torch.utils.data.SequentialSampler([])
    sampler.dataset = ToyDataset(0)
    batches = SeededBatches(sampler, 2)
    batches.begin(seed=0, iteration=0, skip=0, endless=True)
    assert list(batches) == []
