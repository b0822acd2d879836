"""`overlock doctor`."""

import re

import pytest
import torch

from overlock.cli import doctor, main
from overlock.ops import dilated, dilated_cpp, feed_forward
from overlock.ops.contmix import cpp, eager
from overlock.ops.contmix.proof import deviation
from overlock.ops.proof import LIMITS


def test_a_machine_of_the_tests_is_ready(capsys):
    assert main(['doctor', '--quick']) == 0
    out = capsys.readouterr().out
    assert f'torch {torch.__version__}' in out and out.endswith('\nready\n')
    assert 'eager on cpu, float32: right' in out
    assert 'mmcv 2.' in out and 'cpu: nms and roi_align right' in out


def test_a_wrong_backend_is_found_and_told(monkeypatch, capsys):
    monkeypatch.setattr(eager, 'run', lambda inputs, run=eager.run: run(inputs) * 1.001)
    assert main(['doctor', '--quick']) == 1
    out = capsys.readouterr().out
    assert 'eager on cpu, float32: WRONG, deviates from the reference by 1.0e-03' in out
    assert 'at most 1e-05 is right; reinstall torch, and report this output' in out


def test_a_backend_that_fails_is_told_and_the_rest_goes_on(monkeypatch, capsys):
    def fail(inputs):
        raise OSError('no compiler\nat all')

    monkeypatch.setattr(cpp, 'run', fail)
    monkeypatch.setattr(cpp, 'why_unavailable', lambda: '')
    assert main(['doctor', '--quick']) == 1
    out = capsys.readouterr().out
    assert 'cpp on cpu, float32: WRONG, fails with OSError: no compiler\n' in out and 'folders' in out
    assert '`auto` takes eager instead' in out


def test_a_fused_backend_that_is_slower_than_eager_is_told(monkeypatch):
    monkeypatch.setattr(cpp, 'run', eager.run)
    monkeypatch.setattr(cpp, 'why_unavailable', lambda: '')
    monkeypatch.setattr(doctor, 'times', lambda backend, *_: {'xt': (2.0, 3.0) if backend == 'cpp' else (1.0, 1.0)})
    remedies = []
    lines = list(doctor.backends(remedies, quick=False))
    assert any('xt: 2.00 ms, with gradients 3.00 ms' in line for line in lines)
    assert any(remedy.startswith('cpp on cpu, float32 is slower than eager here') for remedy in remedies)


def test_a_gpu_that_torch_cannot_use_and_wrong_operators_of_mmcv_get_remedies(monkeypatch, tmp_path):
    (tmp_path / 'nvidia-smi').write_text('#!/bin/sh\necho 570.1\n')
    (tmp_path / 'nvidia-smi').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr('mmcv.ops.roi_align', lambda *_: torch.zeros(1))
    remedies = []
    assert [*doctor.devices(remedies)][-1] == 'GPU: none that torch can use, driver 570.1'
    assert remedies[0].startswith('there is a GPU with driver 570.1, and torch')
    assert 'cpu: nms and roi_align WRONG' in [*doctor.mmcv_operators(remedies)] and 'are wrong on cpu' in remedies[1]


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
    found = doctor.times('cpp', 'cpu', torch.float32)
    assert found.keys() == {'xt', 's'} and all(0 < alone < both for alone, both in found.values())


@pytest.mark.skipif(bool(cpp.why_unavailable()), reason='the C++ operators are not compiled')
def test_dilated_branches_are_proved_timed_and_told_where_wrong(monkeypatch):
    remedies = []
    (line,) = doctor.dilated_branches(remedies, quick=False)
    assert re.fullmatch(
        r'cpp on cpu, float32: right, deviation .*; a step of 1x64x64x64 takes .* ms, one by one .* ms', line
    )
    with monkeypatch.context() as patch:
        patch.setattr(dilated, 'EAGER_ASKED', True)
        assert next(doctor.dilated_branches([], quick=True)) == 'not used: OVERLOCK_DILATED=eager'
    wrong = dilated_cpp.products
    monkeypatch.setattr(dilated_cpp, 'products', lambda *arguments: wrong(*arguments) * 1.01)
    (line,) = doctor.dilated_branches([], quick=True)
    assert line.startswith('cpp on cpu, float32: WRONG, deviates from the reference by ')
    monkeypatch.setattr(doctor, '_devices', lambda: ['cuda'])
    monkeypatch.setitem(dilated.BACKENDS, 'cuda', dilated_cpp)
    monkeypatch.setattr(dilated_cpp, 'why_unsupported', lambda x: 'no CUDA device')
    monkeypatch.setattr(torch, 'zeros', lambda *size, device: None)
    assert [*doctor.dilated_branches(remedies, quick=True)] == ['cpp: no CUDA device'] and not remedies


@pytest.mark.skipif(bool(cpp.why_unavailable()), reason='the C++ operators are not compiled')
def test_the_feed_forward_part_is_proved_and_told_where_wrong(monkeypatch):
    remedies, right = [], feed_forward.feed_forward
    (line,) = doctor.feed_forward_part(remedies)
    assert line.startswith('cpp on cpu, float32: right, deviation ') and not remedies
    monkeypatch.setattr(feed_forward, 'feed_forward', lambda *tensors: right(*tensors) * 1.001)
    (line,) = doctor.feed_forward_part(remedies)
    assert line.startswith('cpp on cpu, float32: WRONG, ') and 'one by one instead' in remedies[0]
