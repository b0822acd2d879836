"""What benchmarks record and how they show it."""

import argparse
import datetime
import importlib.metadata
import json

import pytest

from benchmarks.record import show, size, write_result


def test_result_is_json_with_all_that_the_figures_depend_on(tmp_path):
    rows = [
        {'name': 'one', 'threads': 3, 'task': {'size': (64, 96), 'dtype': 'fp32'}, 'check': {'gradient': float('inf')}}
    ]
    args = argparse.Namespace(arch='xt', device='cpu', results=tmp_path / 'new')
    path = write_result('network-xt', args, rows, absent={})
    assert [path] == list((tmp_path / 'new').iterdir())
    assert path.name.startswith('network-xt-cpu-') and path.suffix == '.json'
    record = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    assert record['machine']['device'] == 'cpu' and record['machine']['threads'] == 3 and record['machine']['cpu']
    assert record['versions']['torch'] == importlib.metadata.version('torch')
    assert set(record['commit']) == {'hash', 'dirty'}
    assert record['settings'] == {'arch': 'xt', 'device': 'cpu', 'absent': {}}, 'paths are left out'
    assert record['rows'][0]['task'] == {'size': [64, 96], 'dtype': 'fp32'}
    assert record['rows'][0]['check'] == {'gradient': None}
    assert record['command'].startswith('python ') and datetime.datetime.fromisoformat(record['date']).tzinfo


def test_table_has_figures_or_the_reason_why_there_are_none(capsys):
    mode = {
        'seconds': {'median': 0.0125, 'q1': 0.012, 'q3': 0.02},
        'memory': {'above_base': 2**20, 'iteration': 2**19},
        'speedup': 2.0,
    }
    check = {'passed': False, 'deviation': {'output': 0.5, 'gradient': 0.25}}
    rows = [
        {'name': 'right', 'check': {'passed': True, 'deviation': {'fp32': {'output': 1e-6}}}, 'modes': {'train': mode}},
        {'name': 'wrong', 'check': check},
        {'name': 'dead', 'error': 'no such kernel'},
        {'name': 'beside', 'check': None, 'modes': {'train': mode}},
    ]
    show('title', rows)
    title, header, right, wrong, dead, beside = capsys.readouterr().out.strip().splitlines()
    assert title == 'title' and header.split()[:4] == ['row', 'deviation', 'train', 'ms']
    assert right.split() == ['right', '1.0e-06', '12.5', '12', '-', '20', '1.0', '0.5', '2']
    assert wrong.split() == ['wrong', '5.0e-01', 'wrong:', 'no', 'speed']
    assert dead.split() == ['dead', 'no', 'such', 'kernel']
    assert beside.split() == ['beside', '12.5', '12', '-', '20', '1.0', '0.5', '2']


def test_size_is_height_and_width_or_a_clear_sentence():
    assert size('800x1344') == (800, 1344)
    with pytest.raises(argparse.ArgumentTypeError, match="expected HEIGHTxWIDTH such as 800x1344, got '800'"):
        size('800')
