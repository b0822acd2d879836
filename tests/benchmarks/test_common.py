"""What benchmarks record and how they write it."""

import argparse
import datetime
import importlib.metadata
import json

import pytest
import torch

from benchmarks.common import duration, size, summary, write_result, write_whole
from benchmarks.rounds import deviation, may_be_timed


def test_summary_has_the_median_and_quartiles():
    assert summary([5.0, 1.0, 4.0, 2.0, 3.0]) == {'median': 3.0, 'q1': 2.0, 'q3': 4.0, 'count': 5}
    assert summary([2.0]) == {'median': 2.0, 'q1': 2.0, 'q3': 2.0, 'count': 1}


def test_result_is_whole_json_with_all_that_the_figures_depend_on(tmp_path):
    rows = [
        {'name': 'one', 'threads': 3, 'task': {'size': (64, 96), 'dtype': 'fp32'}, 'check': {'gradient': float('inf')}}
    ]
    path = write_result(tmp_path, 'network-xt', 'cpu', {'arch': 'xt', 'results': tmp_path}, rows)
    assert [path] == list(tmp_path.iterdir()), 'nothing but the result is left'
    assert path.name.startswith('network-xt-cpu-') and path.suffix == '.json'
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    assert record['machine']['device'] == 'cpu' and record['machine']['threads'] == 3 and record['machine']['cpu']
    assert record['versions']['torch'] == importlib.metadata.version('torch')
    assert set(record['commit']) == {'hash', 'dirty'}
    assert record['settings'] == {'arch': 'xt'}, 'paths are left out'
    assert record['rows'][0]['task'] == {'size': [64, 96], 'dtype': 'fp32'}
    assert record['rows'][0]['check'] == {'gradient': None}
    assert record['command'].startswith('python ') and datetime.datetime.fromisoformat(record['date']).tzinfo


def test_failed_writing_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / 'result.json'
    path.write_text('old')

    def half(temporary):
        temporary.write_text('ne')
        raise OSError('disk full')

    with pytest.raises(OSError, match='disk full'):
        write_whole(path, half)
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(('seconds', 'text'), [(12.34, '12.3 s'), (0.5, '500 ms'), (2.5e-5, '25 us')])
def test_duration_has_a_unit_that_suits(seconds, text):
    assert duration(seconds) == text


def test_size_is_height_and_width_or_a_clear_sentence():
    assert size('800x1344') == (800, 1344)
    with pytest.raises(argparse.ArgumentTypeError, match="expected HEIGHTxWIDTH such as 800x1344, got '800'"):
        size('800')


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
    assert found == {'output': float('inf')} and not may_be_timed(found, {'output': 1e9})


def test_gate_opens_only_within_every_limit():
    limits = {'output': 1e-5, 'gradient': 1e-4}
    assert may_be_timed({'output': 1e-5, 'gradient': 1e-5}, limits)
    assert not may_be_timed({'output': 1e-5, 'gradient': 2e-4}, limits)
    assert not may_be_timed({'output': float('nan'), 'gradient': 0.0}, limits)
    assert not may_be_timed({'output': 0.0}, limits) and not may_be_timed({}, {})
