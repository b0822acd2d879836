import random
import shutil

import numpy as np
import pytest
import torch

from mmengine_overlock.resume import SeededBatches, seed_all
from mmengine_overlock.run import train
from overlock.utils.errors import CheckpointError, UserError
from tests.mmengine_overlock.runs import EVERYTHING, WORKERS, assert_equal, saved, start, statuses
from tests.toy import ToyDataset

pytestmark = pytest.mark.usefixtures('quick_saves')

BY_RATIO = """
train_dataloader.update(batch_sampler=dict(type='mmdet.AspectRatioBatchSampler'))
"""


def resume(config, folder, checkpoint):
    folder.mkdir()
    shutil.copy(checkpoint, folder)
    return train(config, work_dir=folder, resume='auto')


@pytest.mark.parametrize('more', ['', WORKERS, BY_RATIO, WORKERS + BY_RATIO], ids=['', 'workers', 'ratio', 'both'])
@pytest.mark.parametrize('by_iteration', [False, True], ids=['epochs', 'iterations'])
def test_a_run_resumed_at_any_iteration_ends_like_the_uninterrupted_one(write_toy, tmp_path, by_iteration, more):
    last = 14 if by_iteration else 18
    # At once, within a pass over the data, at its end, and after the last iteration.
    stops = (5, 8) if more else (1, 5, 6, 8, 12, last)
    settings = EVERYTHING + more + 'train_cfg.update(val_interval=3)\n'
    settings += f'train_cfg.update(max_iters={last})\n' if by_iteration else 'train_cfg.update(max_epochs=3)\n'
    # In processes of their own: the workers of several runs in one end seconds later.
    assert statuses(start(write_toy(settings, by_iteration), tmp_path / 'whole')) == [0]
    expected = saved(tmp_path / 'whole' / f'iter_{last}.pth')
    best = {path.name for path in (tmp_path / 'whole').glob('best_*')}
    for iteration in stops:
        folder = tmp_path / str(iteration)
        folder.mkdir()
        shutil.copy(tmp_path / 'whole' / f'iter_{iteration}.pth', folder)
        assert statuses(start(write_toy(settings, by_iteration), folder, resume='auto')) == [0]
        assert_equal(saved(folder / f'iter_{last}.pth'), expected)
        # A run that is resumed after its last validation writes no best checkpoint.
        assert len(best) == 1 and {path.name for path in folder.glob('best_*')} in (best, set())


def test_finite_samplers_by_iteration_go_on_in_the_right_pass(write_toy, tmp_path):
    more = EVERYTHING + "train_dataloader['sampler'] = dict(type='DefaultSampler', shuffle=True)\n"
    train(write_toy(more, True), work_dir=tmp_path / 'whole')
    resume(write_toy(more, True), tmp_path / 'resumed', tmp_path / 'whole' / 'iter_7.pth')
    assert_equal(saved(tmp_path / 'resumed' / 'iter_12.pth'), saved(tmp_path / 'whole' / 'iter_12.pth'))


def test_workers_read_what_one_process_reads(write_toy, tmp_path):
    for name, more in (('none', ''), ('two', WORKERS)):
        assert statuses(start(write_toy(EVERYTHING + more), tmp_path / name)) == [0]
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
