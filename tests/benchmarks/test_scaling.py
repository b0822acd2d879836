"""What processes send each other is counted, the estimate for GPUs follows the formulas, and pipelines are split."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import links, loading, record, scaling

DATA = Path(os.environ.get('OVERLOCK_DATA', 'not set'))
ROW = {
    'task': {'arch': 'xt'},
    'processes': 2,
    'parameters': 10**8,
    'blocks': 10,
    'collectives': {
        'alone': {'calls': 0, 'bytes': 0},
        'gradients': {'calls': 5, 'bytes': 4 * 10**8},
        'statistics': {'calls': 25, 'bytes': 4 * 10**8 + 10**6},
    },
    'on_gpus': {
        'one by one': {'pairs': 100, 'forward': 9000, 'backward': 8000},
        'merged': {'pairs': 20, 'forward': 9000, 'backward': 5000},
    },
    'modes': {
        'alone': {'seconds': {'median': 0.5}},
        'gradients': {'seconds': {'median': 1.0}},
        'statistics': {'seconds': {'median': 4.0}},
    },
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results in the place of the project's."""
    monkeypatch.setattr(record, 'RESULTS', tmp_path)
    return tmp_path


def test_estimate_follows_the_formulas_of_the_document():
    found = links.estimate(ROW, 8)
    tree, ring = 6.8e-6 + 14 * 0.6e-6, 6.6e-6 + 7 * 0.6e-6
    assert found['gradients'] == pytest.approx(5 * tree + 2 * 4e8 * 7 / 8 / 450e9)
    assert found['sharded'] == pytest.approx(30 * ring + 3 * 4e8 * 7 / 8 / 450e9)
    assert found['statistics'] == pytest.approx(100 * (ring + tree) + (7 * 9000 + 2 * 8000 * 7 / 8) / 450e9)
    assert found['merged statistics'] == pytest.approx(40 * tree + 2 * 14000 * 7 / 8 / 450e9)
    far = links.estimate(ROW, 64, 'HDR')
    tree = 6.8e-6 + 2 * (7 * 0.6e-6 + 3 * 5e-6)
    assert far['gradients'] == pytest.approx(5 * tree + 2 * 4e8 * 63 / 64 / 200e9)
    assert far['gradients'] > links.estimate(ROW, 64, 'NDR')['gradients'] > found['gradients']


def test_tables_show_the_newest_result_and_the_step_of_a_gpu(results):
    old = {**ROW, 'parameters': 1}
    for stamp, row in (('20260102T000000', ROW), ('20260101T000000', old)):
        (results / f'scaling-xt-cpu-a-{stamp}.json').write_text(json.dumps({'rows': [row]}))
    tables = links.tables()
    line = '| XT | 2 | 5 calls, 400.00 MB | 50% | 20 calls, 1.00 MB | 75% |'
    assert line in tables['table: sent'].splitlines()
    estimates = tables['table: gpus'].splitlines()
    assert len(estimates) == 7 and 'no step measured' in estimates[2]
    steps = [
        {'name': name, 'modes': {'train': {'seconds': {'median': seconds}}}}
        for name, seconds in (('deploy', 0.1), ('convnext_tiny', 0.05))
    ]
    (results / 'network-xt-train-2x3x800x1344-bf16-nvidia-h200-20260101T000000.json').write_text(
        json.dumps({'rows': [*steps, {'error': 'no such kernel'}]})
    )
    waiting = links.estimate(ROW, 8)['statistics']
    assert f'{waiting / (0.1 + waiting):.0%} of {(0.1 + waiting) * 1e3:.0f} ms' in links.tables()['table: gpus']


def test_transforms_inside_a_choice_are_timed_by_name():
    class Busy:
        def __call__(self, data):
            end = time.process_time() + 0.01
            while time.process_time() < end:
                pass
            return data + 1

    class Choice:
        def __init__(self, *transforms):
            self.transforms = list(transforms)

        def __call__(self, data):
            for transform in self.transforms:
                data = transform(data)
            return data

    seconds = {'Busy': 0.0}
    pipeline = loading.timed(Choice(Busy(), Choice(Busy())), seconds)
    assert pipeline(0) == 2 and 0.02 <= seconds['Busy'] < 0.1


def test_pipelines_show_what_takes_their_time_and_how_many_cores_a_measured_gpu_needs(results):
    parts = {'LoadImageFromFile': [0.002], 'RandomResize': [0.003], 'LoadAnnotations': [0.001], 'RandomFlip': [0.014]}
    rows = [
        {'name': 'ImageNet', 'times': [0.02], 'transforms': parts, 'modes': {}},
        {'name': 'ADE20K', 'times': [0.02], 'transforms': parts, 'modes': {}},
        {'name': 'decode, pillow', 'decoder': 'pillow', 'times': [], 'error': 'not installed'},
    ]
    pipelines, decoders = loading.tables(rows).values()
    figures = '50 | 2.0 ms | 1.0 ms | 3.0 ms | 14.0 ms'
    assert pipelines.splitlines()[3] == f'| ADE20K | {figures} | not measured |  |'
    assert decoders == 'Not measured yet.\n'
    steps = [
        {'name': name, 'modes': {'train': {'images_per_second': rate}}}
        for name, rate in (('deploy', 400), ('published', 100), ('convnext_tiny+compile', 900))
    ]
    name = loading.STEPS['ImageNet'].replace('*', 'h200-20260101T000000')
    (results / name).write_text(json.dumps({'machine': {'gpu': 'H200'}, 'rows': steps}))
    assert loading.tables(rows)['table: loading'].splitlines()[2].endswith('| 400 (H200) | 8.0 |')


def test_tables_without_a_result_say_so(results):
    assert {*links.tables().values(), *loading.tables().values()} == {'Not measured yet.\n'}


@pytest.mark.slow
def test_processes_send_the_gradients_once_and_agree_with_one_process(monkeypatch, results):
    options = '--archs xt --processes 2 --size 64x64 --check-size 64x64 --rounds 1 --results'
    monkeypatch.setattr(sys, 'argv', ['scaling.py', *options.split(), str(results)])
    assert scaling.main() == 0
    (written,) = results.glob('scaling-xt-*.json')
    (row,) = json.loads(written.read_text())['rows']
    alone, gradients, both = row['collectives'].values()
    assert row['check']['passed'] and alone == {'calls': 0, 'bytes': 0}
    assert gradients['bytes'] == 4 * row['parameters']
    single, merged = row['on_gpus'].values()
    # Where branches are merged, two sums each; a single BatchNorm on CPUs makes four.
    assert 2 * merged['pairs'] < both['calls'] - gradients['calls'] <= 4 * single['pairs']
    assert all(len(mode['times']) == 1 for mode in row['modes'].values()) and 'XT | 2' in links.tables()['table: sent']


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / 'coco_tiny').is_dir(), reason='OVERLOCK_DATA does not name a folder with coco_tiny')
def test_pipelines_of_the_configurations_are_split_by_transform(monkeypatch, results):
    monkeypatch.setattr(sys, 'argv', ['loading.py', '--rounds', '1', '--data', str(DATA), '--results', str(results)])
    assert loading.main() == 0
    (written,) = results.glob('loading-*.json')
    rows = {row['name']: row for row in json.loads(written.read_text())['rows']}
    pipelines = {*loading.CONFIGS, 'ImageNet'}
    assert {*rows} == {*pipelines, *(f'decode, {name}' for name in loading.DECODERS)}
    for name in pipelines:
        row = rows[name]
        assert sum(loading.parts_of(row).values()) == pytest.approx(row['times'][0]) and row['images'] >= 40
    assert {'LoadImageFromFile', 'RandomChoiceResize', 'RandomCrop'} <= {*rows['COCO, many scales']['transforms']}
    assert rows['decode, pillow']['check']['passed']
    assert 'modes' in rows['decode, turbojpeg'] or rows['decode, turbojpeg']['error']
