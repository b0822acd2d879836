"""Each benchmark from its command line to its JSON, at the smallest size."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import contmix, network, rounds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a benchmark in this process; its workers are forks of a server that has imported everything already."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['benchmarks.contmix', 'benchmarks.network'])
    monkeypatch.setattr(rounds, 'CONTEXT', context)

    def run(script, *options: str) -> tuple[int, dict]:
        """Return the status and the JSON."""
        common = '--device cpu --threads 1 --rounds 2 --turn-seconds 0 --results'.split()
        monkeypatch.setattr(sys, 'argv', [script.__file__, *common, str(tmp_path), *options])
        status = script.main()
        (written,) = tmp_path.glob('*.json')
        return status, json.loads(written.read_text())

    return run


@pytest.mark.slow
def test_network_times_presets_that_agree_and_refuses_one_that_is_wrong(run, capsys):
    status, record = run(
        network, '--size', '32x64', '--presets', 'train', 'deploy', 'tests.benchmarks.wrong:one_norm_off'
    )
    published, train, deploy, wrong = record['rows']
    for row in (published, train, deploy):
        result = row['modes']['forward']
        assert row['check']['passed'] and len(result['times']) == result['seconds']['count'] == 2
        assert result['images_per_second'] == pytest.approx(1 / result['seconds']['median'])
        assert result['speedup'] == pytest.approx(
            published['modes']['forward']['seconds']['median'] / result['seconds']['median']
        )
        assert result['memory']['peak'] == result['memory']['base'] + result['memory']['above_base'] > 2**20
        assert row['threads'] == 1
    assert published['facts']['aggregation'] in ('aggregate_natten', 'aggregate_unfold')
    assert not wrong['check']['passed'] and 'modes' not in wrong
    assert 'wrong: no speed' in capsys.readouterr().out and status == 1
    assert record['settings']['size'] == [32, 64] and train['task']['dtype'] == 'fp32'
    assert train['task']['network'] == 'backbone'


@pytest.mark.slow
def test_network_compares_gradients_in_training(run):
    options = '--mode train --size 128x128 --batch 2 --presets train train+bf16 --rounds 1'.split()
    status, record = run(network, *options)
    published, train, narrow = record['rows']
    for row in (published, train):
        assert row['task']['network'] == 'backbone' and set(row['check']['deviation']['fp32']) == {'output', 'gradient'}
    assert set(narrow['check']['deviation']) == set(narrow['check']['limit']) == {'fp32', 'bf16'}
    assert status == 0, [row['check'] for row in record['rows']]


def test_operator_times_what_is_right_and_says_of_the_rest_why_not(run):
    wrong = (f'tests.benchmarks.wrong:{name}' for name in ('scaled_output', 'detached_key', 'raises', 'dies'))
    options = '--arch xt --size 64x64 --stage 4 --backends eager unfold'.split()
    status, record = run(contmix, *options, *wrong)
    eager, unfold, scaled, detached, raising, dying = record['rows']
    for row in (eager, unfold):
        assert row['check']['passed'] and {'forward', 'train'} == set(row['modes'])
        assert all(result['seconds']['median'] > 0 for result in row['modes'].values())
    assert scaled['check']['deviation']['output'] == pytest.approx(1e-3, rel=0.5) and not scaled['check']['passed']
    assert detached['check']['deviation']['output'] < 1e-5 < detached['check']['deviation']['gradient']
    assert not any('modes' in row for row in (scaled, detached, raising, dying))
    assert raising['error'] == 'RuntimeError: no such kernel' and dying['error'].startswith('the worker process died')
    assert status == 1 and eager['stage'] == 4 and eager['image'] == [64, 64]


@pytest.mark.slow
def test_command_runs_from_any_folder_in_processes_of_its_own(tmp_path):
    options = '--device cpu --threads 1 --rounds 1 --turn-seconds 0 --arch xt --size 64x64 --stage 4 --backends eager'
    command = [sys.executable, str(ROOT / 'benchmarks' / 'contmix.py'), *options.split(), '--results', str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob('contmix-xt-1-fp32-*.json')
    assert json.loads(written.read_text())['rows'][0]['check']['passed'] and str(written) in done.stdout


@pytest.mark.slow
def test_exported_networks_are_timed_beside_the_deploy_form(run):
    pytest.importorskip('onnxruntime')
    from benchmarks import export

    status, record = run(export, *'--archs xt --sizes 64x96 --forms fixed --rounds 1'.split())
    deploy, exported = (row for row in record['rows'] if 'openvino' not in row['name'])
    assert (deploy['name'], exported['name'], status) == ('deploy', 'onnxruntime fixed', 0)
    for row in (deploy, exported):
        assert row['check']['passed'] and row['modes']['forward']['seconds']['median'] > 0
        assert (row['arch'], row['image']) == ('xt', [64, 96])
    assert exported['facts']['bytes'] > 2**20 and record['versions']['onnxruntime']


def test_the_size_of_an_exported_network_is_that_of_its_own_files(monkeypatch, tmp_path):
    from benchmarks import export

    for name, count in (('a.onnx', 100), ('a.xml', 20), ('a.bin', 3)):
        (tmp_path / name).write_bytes(bytes(count))
    monkeypatch.setattr(export, 'RUNTIMES', dict.fromkeys(export.RUNTIMES, ('', lambda file: None)))
    sizes = [
        export.ExportedCase(runtime, str(tmp_path / name), (1, 1)).facts['bytes']
        for runtime, name in (('onnxruntime', 'a.onnx'), ('openvino', 'a.xml'))
    ]
    assert sizes == [100, 23]


@pytest.mark.slow
def test_detectors_are_timed_part_by_part_when_the_tuned_one_agrees(run, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.delenv('OVERLOCK_DATA', raising=False)
    from benchmarks import detector

    options = '--size 160x192 --rounds 1 --config mask_rcnn_overlock_xt_1x --rows tuned'
    status, record = run(detector, *options.split())
    assert status == 0, record['rows']
    built, tuned = record['rows']
    assert built['check']['passed'] and tuned['check']['passed']
    assert 0 < tuned['check']['deviation']['fp32']['output'] < 1e-4
    for row in record['rows']:
        assert {'backbone', 'neck', 'RPN', 'RoIAlign', 'box heads', 'mask heads', 'post-processing'} < set(row['parts'])
        assert row['modes']['test']['speedup'] > 0 and row['modes']['test']['memory']['above_base'] > 0


@pytest.mark.slow
def test_training_steps_of_segmenters_are_timed_part_by_part(run):
    pytest.importorskip('mmseg')
    from benchmarks import detector

    options = '--mode train --size 64x64 --batch 2 --rounds 1 --config upernet_overlock_xt_160k --rows built'
    status, record = run(detector, *options.split())
    (built,) = record['rows']
    parts = {'data', 'backbone', 'head', 'auxiliary head', 'head, backward', 'backbone, backward', 'optimizer'}
    assert status == 0 and parts < set(built['parts']), built


@pytest.mark.slow
def test_gpu_script_runs_every_step_dry_and_keeps_nothing():
    results = ROOT / 'benchmarks' / 'results'
    before = sorted(results.iterdir())
    command = ['bash', str(ROOT / 'benchmarks' / 'gpu.sh'), '--dry-run', 'doctor', 'operator', 'backbone', 'inference']
    done = subprocess.run(command, env={**os.environ, 'PYTHON': sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for step in ('overlock doctor', 'contmix.py', '--mode train', '--mode forward'):
        assert any(line.startswith('== ') and step in line for line in done.stdout.splitlines()), step
    assert done.stdout.count('.json') == 3 and 'convnext_tiny+compile' in done.stdout
    assert sorted(results.iterdir()) == before


def test_gpu_script_names_its_steps_where_one_is_unknown():
    done = subprocess.run(['bash', str(ROOT / 'benchmarks' / 'gpu.sh'), 'all'], capture_output=True, text=True)
    assert done.returncode == 2 and 'doctor tests operator backbone train inference detector, got all' in done.stderr
