"""Each benchmark from its command line to its JSON, at the smallest size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.network import check_size
from benchmarks.operator import check_map

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *options: str, folder: Path, cwd: Path = ROOT) -> tuple[subprocess.CompletedProcess, dict]:
    """The finished process and the JSON that it wrote."""
    command = [
        sys.executable,
        str(ROOT / 'benchmarks' / script),
        '--device',
        'cpu',
        '--threads',
        '1',
        '--rounds',
        '2',
        '--turn-seconds',
        '0',
        '--results',
        str(folder),
        *options,
    ]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    written = list(folder.glob('*.json'))
    assert len(written) == 1, done.stderr
    return done, json.loads(written[0].read_text())


@pytest.mark.slow
def test_network_times_presets_that_agree_and_refuses_one_that_is_wrong(tmp_path):
    done, record = run(
        'network.py',
        '--size',
        '64x64',
        '--network',
        'backbone',
        '--presets',
        'train',
        'deploy',
        'tests.benchmarks.wrong:one_norm_off',
        folder=tmp_path,
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
    assert 'wrong: no speed' in done.stdout and done.returncode == 1
    assert record['settings']['size'] == [64, 64] and train['task']['dtype'] == 'fp32'


@pytest.mark.slow
def test_network_compares_gradients_in_training(tmp_path):
    done, record = run(
        'network.py',
        '--mode',
        'train',
        '--size',
        '64x64',
        '--batch',
        '2',
        '--presets',
        'train',
        '--rounds',
        '1',
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for row in record['rows']:
        assert row['task']['network'] == 'backbone' and set(row['check']['deviation']['fp32']) == {'output', 'gradient'}


@pytest.mark.slow
def test_operator_times_what_is_right_and_says_of_the_rest_why_not(tmp_path):
    # From its own folder, where the script could hide Python's own `operator`.
    wrong = (f'tests.benchmarks.wrong:{name}' for name in ('scaled_output', 'detached_key', 'raises', 'dies'))
    done, record = run(
        'operator.py',
        '--arch',
        'xt',
        '--size',
        '64x64',
        '--stage',
        '4',
        '--backends',
        'eager',
        'unfold',
        *wrong,
        folder=tmp_path,
        cwd=ROOT / 'benchmarks',
    )
    eager, unfold, scaled, detached, raising, dying = record['rows']
    for row in (eager, unfold):
        assert row['check']['passed'] and {'forward', 'train'} == set(row['modes'])
        assert all(result['seconds']['median'] > 0 for result in row['modes'].values())
    assert scaled['check']['deviation']['output'] == pytest.approx(1e-3, rel=0.5) and not scaled['check']['passed']
    assert detached['check']['deviation']['output'] < 1e-5 < detached['check']['deviation']['gradient']
    assert not any('modes' in row for row in (scaled, detached, raising, dying))
    assert raising['error'] == 'RuntimeError: no such kernel' and 'ended with status 9' in dying['error']
    assert done.returncode == 1 and eager['stage'] == 4 and eager['image'] == [64, 64]


@pytest.mark.slow
def test_growth_writes_a_row_for_each_shape_and_draws_them(tmp_path):
    from PIL import Image

    figure = tmp_path / 'cost.png'
    done, record = run(
        'growth.py',
        '--arch',
        'xt',
        '--sizes',
        '64x64',
        '96x128',
        '--batches',
        '1',
        '2',
        '--figure',
        str(figure),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    shapes = [(*row['task']['size'], row['task']['batch']) for row in record['rows']]
    assert shapes == [(64, 64, 1), (96, 128, 1), (64, 64, 2)]
    with Image.open(figure) as picture:
        assert min(picture.size) > 600 and len(picture.convert('RGB').getcolors(2**24)) > 10


def test_training_is_checked_on_a_smaller_image_of_the_same_shape_where_float64_needs_too_much():
    assert check_size((800, 1344), 1, 'forward') == (800, 1344)
    assert check_size((512, 512), 2, 'train') == (512, 512)
    height, width = check_size((800, 1344), 2, 'train')
    assert 2 * height * width <= 2 * 512 * 512 and width / height == pytest.approx(1344 / 800, rel=0.1)


def test_operator_is_checked_on_a_map_that_the_reference_has_room_for():
    task = {'kernel_sizes': (5, 13), 'channels': 320, 'batch': 2}
    assert check_map({**task, 'size': (14, 14)}) == (14, 14)
    height, width = check_map({**task, 'size': (50, 84)})
    assert (height, width) < (50, 84) and min(height, width) >= 13
