"""The gate in front of the timing, and the statistics behind it."""

import pytest
import torch

from benchmarks.rounds import deviation, is_within, summary


def test_summary_has_the_median_and_quartiles():
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0]) == {'median': 3.0, 'q1': 2.0, 'q3': 4.0, 'count': 5}
    assert summary([2.0]) == {'median': 2.0, 'q1': 2.0, 'q3': 2.0, 'count': 1}


def test_deviation_is_relative_by_largest_element_and_by_norm():
    truth = {'output 0': torch.tensor([1.0, -4.0]), 'gradient a': torch.tensor([3.0, 4.0])}
    results = {'output 0': torch.tensor([1.2, -4.0]), 'gradient a': torch.tensor([3.0, 4.5])}
    assert deviation(results, truth) == pytest.approx({'output': 0.05, 'gradient': 0.1})
    assert deviation(truth, truth) == {'output': 0.0, 'gradient': 0.0}


def test_vanishing_gradient_is_compared_with_the_largest_one():
    truth = {'gradient a': torch.tensor([100.0]), 'gradient b': torch.tensor([1e-9])}
    assert deviation({**truth, 'gradient b': torch.tensor([-1e-9])}, truth)['gradient'] == pytest.approx(2e-9)


@pytest.mark.parametrize(
    'wrong',
    [{}, {'output': torch.tensor([1.0])}, {'output': torch.tensor([1.0, float('nan')])}],
    ids=['missing', 'other shape', 'not finite'],
)
def test_gate_stays_shut_for_what_cannot_be_compared(wrong):
    found = deviation(wrong, {'output': torch.tensor([1.0, 2.0])})
    assert found == {'output': float('inf')} and not is_within(found, {'output': 1e9})


def test_gate_opens_only_within_every_limit():
    limits = {'output': 1e-5, 'gradient': 1e-4}
    assert is_within({'output': 1e-5, 'gradient': 1e-5}, limits)
    assert not is_within({'output': 1e-5, 'gradient': 2e-4}, limits)
    assert not is_within({'output': float('nan'), 'gradient': 0.0}, limits)
    assert not is_within({'output': 0.0}, limits) and not is_within({}, {})
