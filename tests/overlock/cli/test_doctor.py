"""`overlock doctor`."""

import pytest
import torch

from overlock.cli import doctor, main
from overlock.ops.contmix import cpp, eager
from overlock.ops.contmix.proof import LIMITS, deviation


def test_a_machine_of_the_tests_is_ready(capsys):
    assert main(['doctor', '--quick']) == 0
    out = capsys.readouterr().out
    assert f'torch {torch.__version__}' in out and out.endswith('\nready\n')
    assert 'eager on cpu, float32: right' in out


def test_a_wrong_backend_is_found_and_told(monkeypatch, capsys):
    monkeypatch.setattr(eager, 'run', lambda inputs, run=eager.run: run(inputs) * 1.001)
    assert main(['doctor', '--quick']) == 1
    out = capsys.readouterr().out
    assert 'eager on cpu, float32: WRONG' in out and "set contmix_backend='eager' in the backbone" in out


@pytest.mark.parametrize('what', ['output', 'nan'])
def test_deviation_sees_what_is_wrong(monkeypatch, what):
    def wrong(inputs, run=eager.run):
        out = run(inputs)
        return out.clone().index_fill_(3, torch.tensor([13]), float('nan')) if what == 'nan' else out.roll(1, 3)

    assert deviation('eager', 'cpu') <= LIMITS[torch.float32]
    monkeypatch.setattr(eager, 'run', wrong)
    assert not deviation('eager', 'cpu') <= LIMITS[torch.float32]


def test_other_versions_and_folders_get_remedies(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    monkeypatch.setattr(doctor.importlib.metadata, 'version', lambda name: '0.1')
    remedies = []
    lines = list(doctor.versions(remedies))
    assert any('mmdet 0.1 (tested with' in line for line in lines)
    assert remedies[0] == 'torch 2.5.1 is too old; install 2.6 or newer'
    assert any(remedy.startswith('mmengine 0.1 is outside of the tested') for remedy in remedies)


@pytest.mark.skipif(bool(cpp.why_unavailable()), reason='the C++ operators are not compiled')
def test_times_are_those_of_both_variants():
    text = doctor.times('cpp', 'cpu', torch.float32)
    assert text.count('; ') == 2 and 's: ' in text and 'with gradients' in text
