import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmengine_overlock.checkpoint import find_resumable
from mmengine_overlock.run import train
from mmengine_overlock.work_dir import owned
from overlock.checkpoint.reading import check_whole
from overlock.utils.errors import UserError
from tests.mmengine_overlock.runs import EVERYTHING, assert_equal, saved, start, statuses, wait_for

ONE_KEPT = """
default_hooks['checkpoint'].update(max_keep_ckpts=1)
param_scheduler[0]['end'] = 10000
train_cfg.update(max_epochs=10000, val_interval=1)
train_dataloader['dataset'].update(delay=0.001)
val_dataloader['dataset'] = dict(type='ToyDataset', delay=0.001)
"""


def iteration(path):
    return torch.load(path, weights_only=False)['meta']['iter']


@pytest.mark.slow
def test_forty_kills_lose_no_checkpoint(write_toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Config, 'pretty_text', '')
    folder, chance = tmp_path / 'a', random.Random(0)
    reached, drafts, best = 0, 0, 0
    for kill in range(40):
        before = {path.name for path in folder.glob('iter_*')}
        (running,) = start(write_toy(EVERYTHING + ONE_KEPT), folder, resume='auto')
        # One in five is killed before it trains.
        while kill % 5 and running.is_alive() and {path.name for path in folder.glob('iter_*')} <= before:
            time.sleep(0.01)
        time.sleep(chance.uniform(0.0, 0.8))
        os.kill(running.pid, signal.SIGKILL)
        assert statuses([running]) == [-signal.SIGKILL]
        drafts += len(list(folder.glob('.*.draft')))
        checkpoints = list(folder.glob('*.pth'))
        for path in checkpoints:
            check_whole(path)
        averages = [path for path in checkpoints if path.name.startswith('best_')]
        assert len(averages) >= (best > 0)
        best = len(averages)
        found = find_resumable(folder)
        assert found is not None or reached == 0
        assert reached <= (reached := iteration(found) if found else 0)
        # What a killed process could not delete the next one does.
        assert len(checkpoints) <= 4
    # Kills hit writing, too.
    assert reached > 100 and drafts > 0
    end = (reached // 6 + 2) * 6
    for name, options in (('a', dict(resume='auto')), ('whole', {})):
        more = EVERYTHING + ONE_KEPT + f'train_cfg.update(max_epochs={end // 6})\n'
        if name == 'whole':
            more += "default_hooks['checkpoint'].update(interval=10000)\n"
        train(write_toy(more), work_dir=tmp_path / name, **options)
    assert_equal(saved(folder / f'iter_{end}.pth'), saved(tmp_path / 'whole' / f'iter_{end}.pth'))


@pytest.mark.parametrize('failing', ['epoch_2.pth', 'best_error_epoch_2.pth'])
def test_the_old_checkpoint_is_deleted_after_the_new_one_is_written(write_toy, tmp_path, monkeypatch, failing):
    more = (
        "default_hooks['checkpoint'] = dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='error', "
        "rule='less')\ntrain_cfg.update(val_interval=1)\n"
    )
    replace = os.replace

    def interrupt(source, target):
        if Path(target).name == failing:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, 'replace', interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(write_toy(more), work_dir=tmp_path / 'a')
    assert (tmp_path / 'a' / 'best_error_epoch_1.pth').exists()
    assert (tmp_path / 'a' / 'epoch_1.pth').exists() == (failing == 'epoch_2.pth')
    monkeypatch.setattr(os, 'replace', replace)
    train(write_toy(more), work_dir=tmp_path / 'a', resume='auto')
    assert [path.name for path in (tmp_path / 'a').glob('epoch_*')] == ['epoch_4.pth']
    assert len(list((tmp_path / 'a').glob('best_*'))) == 1


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(write_toy, tmp_path):
    slow = "loader['dataset']['delay'] = 0.05\n"
    (first,) = start(write_toy(slow + 'train_dataloader.update(num_workers=1)\n'), tmp_path / 'a')
    wait_for(tmp_path / 'a' / 'epoch_1.pth')
    # The first run removes its drafts by itself.
    before = {path.name for path in (tmp_path / 'a').iterdir() if path.suffix != '.draft'}
    with pytest.raises(UserError, match=rf'Another run \(process {first.pid} on .*\) writes to .*/a; end it, or give'):
        train(write_toy(), work_dir=tmp_path / 'a')
    assert before <= {path.name for path in (tmp_path / 'a').iterdir()}
    first.kill()
    first.join()
    # Its workers look after their parent every few seconds.
    train(write_toy(), work_dir=tmp_path / 'a', resume='auto')
    train(write_toy(), work_dir=tmp_path / 'a')


def test_what_killed_runs_left_half_written_is_removed(tmp_path):
    (tmp_path / '.epoch_2.abcdefgh.draft').mkdir()
    (tmp_path / '.epoch_2.abcdefgh.draft' / 'epoch_2.pth').write_bytes(b'half')
    (tmp_path / '.mine').mkdir()
    with owned(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == ['.lock', '.mine']


def test_a_copied_folder_resumes_from_itself_and_leaves_the_original_alone(write_toy, tmp_path):
    more = "default_hooks['checkpoint'].update(save_best='error', rule='less')\ntrain_cfg.update(val_interval=1)\n"
    train(write_toy(more), work_dir=tmp_path / 'a', cfg_options={'train_cfg.max_epochs': 2})
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    assert Path((tmp_path / 'b' / 'last_checkpoint').read_text()) == tmp_path / 'a' / 'epoch_2.pth'
    assert find_resumable(tmp_path / 'b') == tmp_path / 'b' / 'epoch_2.pth'
    best = {path.name for path in (tmp_path / 'a').glob('best_*')}
    train(write_toy(more), work_dir=tmp_path / 'b', resume='auto')
    assert best and {path.name for path in (tmp_path / 'a').glob('best_*')} == best
    (moved,) = (tmp_path / 'b').glob('best_*')
    assert moved.name not in best


def test_checkpoints_kept_elsewhere_are_found(tmp_path):
    (tmp_path / 'a').mkdir()
    torch.save(dict(meta=dict(iter=1)), tmp_path / 'iter_1.pth')
    (tmp_path / 'a' / 'last_checkpoint').write_text(str(tmp_path / 'iter_1.pth'))
    assert find_resumable(tmp_path / 'a') == tmp_path / 'iter_1.pth'
