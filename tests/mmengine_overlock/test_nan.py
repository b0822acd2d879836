"""Losses and gradients that are not finite stop a run or are left out; checkpoints hold finite weights."""

import re
import subprocess
import sys

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from mmengine_overlock.checkpoint import find_resumable
from mmengine_overlock.run import train
from overlock.utils.errors import UserError
from overlock.utils.finite import LIMIT, non_finite
from tests.mmengine_overlock.faulty import CONFIG
from tests.testing import ROOT

SCALED = "optim_wrapper['type'] = 'ScaledOptimWrapper'\n"


@pytest.fixture
def write_faulty(write_toy):
    return lambda faults, more='': write_toy(CONFIG.format(faults=faults) + more)


class Watch(Hook):
    """Keep the weights after each iteration, also after the one that stops the run."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.weights = []

    def after_train_iter(self, runner, **kwargs):
        self.weights.append({name: value.clone() for name, value in runner.model.state_dict().items()})


@pytest.fixture
def watch(monkeypatch):
    """The `Watch` of the runs of a test."""
    hook, original = Watch(), Runner.register_default_hooks
    monkeypatch.setattr(
        Runner, 'register_default_hooks', lambda self, *args: (original(self, *args), self.register_hook(hook))
    )
    return hook


@pytest.mark.parametrize(
    ('fault', 'told'),
    [
        ('loss', r'{at} \(loss nan, loss_toy {n}, loss_more nan; images: 2.jpg, 3.jpg\)'),
        ('constant', r'{at} \(loss inf, loss_toy {n}, loss_more inf; images: 2.jpg, 3.jpg\)'),
        ('gradient', r'{at} \(loss {n}, loss_toy {n}, loss_more 0; images: 2.jpg, 3.jpg\)'),
    ],
)
@pytest.mark.parametrize('clip', ['', "optim_wrapper['clip_grad'] = dict(max_norm=1.0)\n"], ids=['', 'clipped'])
def test_the_first_update_that_is_not_finite_stops_the_run(write_faulty, tmp_path, watch, fault, told, clip):
    # It comes in the second of four epochs, when a checkpoint of the first is there.
    late = f"model.update(faults={{}})\nfaults_from = dict(epoch=1, faults={{'3.jpg': {fault!r}}})\n"
    hook = "custom_hooks = [dict(type='LateFaults', **faults_from)]\n"
    with pytest.raises(
        UserError, match=told.format(at='of iteration 10 is not finite', n=r'[\d.]+', images='2.jpg, 3.jpg')
    ):
        train(write_faulty({}, late + hook + clip), work_dir=tmp_path / 'a')
    assert len(watch.weights) == 10
    before, after = watch.weights[-2:]
    torch.testing.assert_close(
        {name: value for name, value in after.items() if 'norm' not in name},
        {name: value for name, value in before.items() if 'norm' not in name},
        rtol=0,
        atol=0,
    )
    assert [path.name for path in (tmp_path / 'a').glob('*.pth')] == ['epoch_1.pth']


def test_skip_leaves_out_the_update_and_goes_on(write_faulty, tmp_path, watch):
    # An infinite map reaches the statistics of the BatchNorm too.
    train(write_faulty({'3.jpg': 'map', '8.jpg': 'gradient'}), work_dir=tmp_path / 'a', on_nan='skip')
    assert len(watch.weights) == 32
    assert not any(non_finite(weights) for weights in watch.weights[2:3])
    for i, (before, after) in enumerate(zip(watch.weights, watch.weights[1:], strict=False), 2):
        same = torch.equal(before['toy_head.weight'], after['toy_head.weight'])
        assert same == (i % 8 in (2, 5))
    final = torch.load(tmp_path / 'a' / 'epoch_4.pth', weights_only=False)['state_dict']
    assert not non_finite(final) and len(list((tmp_path / 'a').glob('*.pth'))) == 4
    log = next((tmp_path / 'a').glob('*/*.log')).read_text()
    assert 'images: 2.jpg, 3.jpg): this update was left out, 1 so far' in log
    assert re.findall(r'left out, (\d+) so far', log)[-1] == '8'


def test_skipping_every_update_stops_the_run(write_faulty, tmp_path, watch):
    faults = {f'{i}.jpg': 'loss' for i in range(16)}
    with pytest.raises(UserError, match=f'iteration {LIMIT} is not finite .* after {LIMIT} updates in a row'):
        train(write_faulty(faults), work_dir=tmp_path / 'a', on_nan='skip')


def test_updates_that_the_loss_scale_leaves_out_are_usual_up_to_a_limit(write_faulty, tmp_path, watch):
    train(write_faulty({'3.jpg': 'map'}, SCALED), work_dir=tmp_path / 'a')
    assert len(watch.weights) == 32 and not non_finite(watch.weights[-1])
    faults = {f'{i}.jpg': 'gradient' for i in range(16)}
    with pytest.raises(UserError, match=f'iteration {LIMIT} is not finite .* after {LIMIT} updates in a row'):
        train(write_faulty(faults, SCALED), work_dir=tmp_path / 'b')


def test_with_accumulated_gradients_the_losses_of_all_steps_count(write_faulty, tmp_path):
    more = "optim_wrapper['accumulative_counts'] = 4\n"
    with pytest.raises(UserError, match='iteration 4 is not finite'):
        train(write_faulty({'3.jpg': 'constant'}, more), work_dir=tmp_path / 'a')


@pytest.mark.parametrize('average', ['', "custom_hooks.append(dict(type='EMAHook'))\n"], ids=['', 'with an average'])
def test_a_checkpoint_with_weights_that_are_not_finite_is_not_written(write_faulty, tmp_path, average):
    more = "custom_hooks = [dict(type='Spoil', epoch=1)]\n" + average
    with pytest.raises(UserError, match='1 tensors of the model .first backbone.fc.bias. are not finite after iter'):
        train(write_faulty({}, more), work_dir=tmp_path / 'a')
    assert [path.name for path in (tmp_path / 'a').glob('*.pth')] == ['epoch_1.pth']


class SpoilAverage(Hook):
    """Put a NaN into the average after the second epoch."""

    def after_train_epoch(self, runner):
        if runner.epoch == 1:
            (average,) = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
            average.ema_model.module.backbone.fc.bias.data[0] = torch.nan


def test_an_average_that_is_not_finite_is_not_written(write_faulty, tmp_path, monkeypatch):
    original = Runner.register_default_hooks
    monkeypatch.setattr(
        Runner,
        'register_default_hooks',
        lambda self, *args: (original(self, *args), self.register_hook(SpoilAverage())),
    )
    with pytest.raises(UserError, match='1 tensors of the model .first backbone.fc.bias. are not finite after iter'):
        train(write_faulty({}, "custom_hooks = [dict(type='EMAHook')]\n"), work_dir=tmp_path / 'a')
    assert [path.name for path in (tmp_path / 'a').glob('*.pth')] == ['epoch_1.pth']


def test_a_checkpoint_with_weights_that_are_not_finite_is_not_chosen_for_resume(write_faulty, tmp_path):
    train(write_faulty({}), work_dir=tmp_path)
    content = torch.load(tmp_path / 'epoch_4.pth', weights_only=False)
    content['state_dict']['backbone.fc.weight'][0] = torch.nan
    torch.save(content, tmp_path / 'epoch_4.pth')
    assert find_resumable(tmp_path) == tmp_path / 'epoch_3.pth'


def test_an_unknown_policy_is_one_sentence(write_faulty):
    with pytest.raises(UserError, match='is one of stop, skip, got go-on'):
        train(write_faulty({}), on_nan='go-on')


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['stop', 'skip'])
def test_a_loss_of_one_process_counts_in_all(write_faulty, tmp_path, policy):
    # With two processes, the second has the odd images: 5.jpg and 7.jpg in its second step.
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command += [str(ROOT / 'tools' / 'train.py'), str(write_faulty({'7.jpg': 'constant'})), '--launcher', 'pytorch']
    command += ['--work-dir', str(tmp_path / 'a'), '--on-nan', policy]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    told = r'The loss of iteration 2 is not finite \(loss inf, loss_toy [\d.]+, loss_more inf; images: 5.jpg, 7.jpg\)'
    if policy == 'stop':
        assert result.returncode != 0 and len(re.findall(told, result.stderr)) == 1
        assert 'exitcode  : 2' in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        log = next((tmp_path / 'a').glob('*/*.log')).read_text()
        assert log.count('; images: 5.jpg, 7.jpg): this update was left out') == 4
