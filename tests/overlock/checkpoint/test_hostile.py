"""Every crafted or damaged file is one sentence: no code runs, no process ends, no memory is taken."""

import json
import os
import subprocess
import sys

import pytest
import torch

from overlock import OverLoCKBackbone
from tests.overlock.checkpoint import hostile
from tests.testing import ROOT, TINY, randomise

# Python's own objects, and what the machine adds.
SLACK = 160 << 20


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    """By name, what loading a file in a process of its own gave: message, more memory at the peak, size."""
    folder = tmp_path_factory.mktemp('hostile')
    weights = randomise(OverLoCKBackbone(TINY, out_indices=(0,))).state_dict()
    torch.save(weights, folder / 'whole.pth')
    paths = hostile.make(folder, dict(weights))
    (folder / 'paths.json').write_text(json.dumps({name: str(path) for name, path in paths.items()}))
    command = [sys.executable, '-m', hostile.__name__, str(folder / 'paths.json'), str(folder / 'whole.pth')]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f'ended by {result.returncode} at {lines[-1:]}: {result.stderr[-2000:]}'
    assert not list(folder.rglob(f'*{hostile.CANARY}*'))
    found = {name: outcome for name, outcome in lines if outcome}
    assert found.keys() == paths.keys()
    return found


def test_no_file_loads_and_each_is_one_sentence(outcomes):
    wrong = {}
    for name, (message, _, _) in outcomes.items():
        sentence = message.removeprefix('refused: ')
        whole = 'bit changed' in name and message == 'loaded, the same'
        good = message != sentence and '\n' not in sentence and len(sentence) < 700 and 'Traceback' not in sentence
        if not (whole or good):
            wrong[name] = message
    assert not wrong
    assert len(outcomes) >= 300


def test_no_file_takes_more_memory_than_twice_its_size(outcomes):
    assert not {name: more >> 20 for name, (_, more, size) in outcomes.items() if more > 2 * size + SLACK}


def test_bits_that_changed_in_weights_never_load(outcomes):
    flips = {name: message for name, (message, _, _) in outcomes.items() if 'changed in weights' in name}
    assert len(flips) == 16
    assert 'loaded' not in flips.values()
    assert outcomes['bit changed in a tensor'][0].startswith('refused')
