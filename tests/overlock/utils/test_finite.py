"""The guard of updates, with the optimizers and the scaler of PyTorch."""

import pytest
import torch
from torch import nn

from overlock.utils.errors import UserError
from overlock.utils.finite import LIMIT, UpdateGuard, non_finite

OPTIMIZERS = {
    'SGD': lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    'AdamW': lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    'fused AdamW': lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
}

FAULTS = [dict(factor=torch.nan), dict(factor=-torch.inf), dict(map_factor=torch.inf)]


class Run:
    """A model with a BatchNorm, an optimizer and a guard; `update` multiplies the gradients by a factor."""

    def __init__(self, optimizer='AdamW', policy='skip', scaled=False):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scaler = torch.amp.GradScaler('cpu', enabled=scaled)
        self.guard = UpdateGuard(self.optimizer, self.model, policy, scaled)

    def update(self, factor=1.0, loss_factor=1.0, map_factor=1.0):
        loss = self.model(torch.randn(8, 3) * map_factor).square().mean()
        self.guard.watch(loss * loss_factor)
        self.scaler.scale(loss).backward()
        self.model[0].bias.grad[0] *= factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return self.guard.made()

    def state(self):
        state = [self.model.state_dict(), *self.optimizer.state_dict()['state'].values()]
        return [{name: torch.as_tensor(value).clone() for name, value in part.items()} for part in state]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize('scaled', [False, True], ids=['', 'scaled'])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize(
    'fault', [dict(factor=torch.nan), dict(factor=-torch.inf), dict(map_factor=torch.inf)], ids=str
)
def test_an_update_that_is_left_out_changes_neither_weights_nor_statistics_nor_the_optimizer(optimizer, scaled, fault):
    run = Run(optimizer, scaled=scaled)
    assert run.update() and run.update()
    before = run.state()
    assert not run.update(**fault)
    after = run.state()
    if scaled and 'map_factor' not in fault:
        # An overflow of scaled gradients says nothing against the statistics.
        statistics = {name: after[0].pop(name) for name in list(after[0]) if name in dict(run.model.named_buffers())}
        assert any(not torch.equal(value, before[0].pop(name)) for name, value in statistics.items())
        before[0] = {name: before[0][name] for name in after[0]}
    assert_same(after, before)
    assert run.guard.skipped == run.guard.in_a_row == 1 and not run.guard.must_stop
    assert run.update()
    assert run.guard.in_a_row == 0
    with pytest.raises(AssertionError):
        assert_same(run.state(), before)


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
@pytest.mark.parametrize('scaled', [False, True], ids=['', 'scaled'])
def test_a_loss_alone_stops_a_run(value, scaled):
    run = Run(policy='stop', scaled=scaled)
    assert run.update()
    before = run.state()[1:]
    assert not run.update(loss_factor=value)
    assert run.guard.must_stop
    assert_same(run.state()[1:], before)


def test_a_gradient_stops_a_run_and_its_weights_stay_finite_though_nothing_waits():
    run = Run(policy='stop')
    assert run.guard.may_wait
    run.guard.may_wait = False
    assert run.update()
    assert not run.update(factor=torch.nan)
    assert run.guard.must_stop and not non_finite(run.model.state_dict())


@pytest.mark.parametrize(('policy', 'scaled'), [('skip', False), ('stop', True), ('skip', True)])
def test_a_row_of_updates_left_out_ends_a_run_and_one_that_is_made_ends_the_row(policy, scaled):
    run = Run(policy=policy, scaled=scaled)
    for _ in range(2):
        for _ in range(LIMIT - 1):
            assert not run.update(factor=torch.inf)
        assert not run.guard.must_stop
        assert run.update()
    for _ in range(LIMIT):
        run.update(factor=torch.inf)
    assert run.guard.must_stop and run.guard.skipped == 3 * LIMIT - 2


def test_finite_updates_are_those_of_an_optimizer_without_a_guard():
    runs = [Run(policy=policy) for policy in ('skip', 'stop', 'stop')]
    runs[-1].optimizer._optimizer_step_pre_hooks.clear()
    for run in runs:
        torch.manual_seed(1)
        for _ in range(5):
            run.update()
    assert_same(runs[0].state(), runs[2].state())
    assert_same(runs[1].state(), runs[2].state())


def test_non_finite_names_tensors_of_numbers_alone():
    tensors = dict(
        a=torch.tensor([1.0, torch.nan]), b=torch.ones(2), c=torch.tensor(-torch.inf).half(), d=torch.arange(3), e='x'
    )
    assert non_finite(tensors) == ['a', 'c']


def test_an_unknown_policy_is_one_sentence():
    with pytest.raises(UserError, match='is one of stop, skip, got ignore'):
        Run(policy='ignore')


def test_statistics_return_to_those_of_a_resume():
    run = Run(scaled=True)
    run.model[1].running_mean.fill_(3.0)
    run.guard.keep()
    assert not run.update(map_factor=torch.inf)
    assert_same(run.model[1].running_mean, torch.full((4,), 3.0))
