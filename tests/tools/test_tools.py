import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'
TOYS = ROOT / 'tests' / 'mmengine_overlock'

CONFIG = """
custom_imports = dict(imports=['toy'], allow_failed_imports=False)
model = dict(type='ToyModel', backbone=dict(type='ToyBackbone'), norm_cfg=None)
loader = dict(num_workers=0, collate_fn=dict(type='default_collate'), dataset=dict(type='ToyDataset'))
train_dataloader = dict(**loader, batch_size=2, sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(**loader, batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = dict(**loader, batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = test_evaluator = dict(type='ToyMetric')
train_cfg = dict(by_epoch=True, max_epochs=2)
val_cfg = test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
randomness = dict(seed=0)
"""

COCO = """
default_scope = 'mmdet'
train_dataloader = dict(dataset=dict(type='CocoDataset', data_root='data/coco/', ann_file='annotations/a.json',
                                     data_prefix=dict(img='train/')))
"""


def run(*command, folder, **environment):
    """Run a tool from another folder than the repository's, on the CPU."""
    environment = {
        **os.environ,
        'PYTHONPATH': str(TOYS),
        'PYTHON': sys.executable,
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': '1',
        **environment,
    }
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        environment.pop(name, None)
    command = [sys.executable, *command] if str(command[0]).endswith('.py') else ['bash', *command]
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / 'toy_config.py'
    path.write_text(CONFIG)
    return path


def weights(path):
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']


def metrics(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return re.findall(r'\((?:val|test)\).*(error: \d\.\d{4}  images: \d+)', result.stdout)


def test_a_missing_data_set_is_one_sentence_and_code_2(tmp_path):
    (tmp_path / 'a.py').write_text(COCO)
    result = run(TOOLS / 'train.py', 'a.py', folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ''
    assert result.stderr == (
        'The train data set cannot be used: data/coco/annotations/a.json does not exist; expected annotations/a.json '
        "in COCO's format and its images in train/, below data/coco/, which --data-root DIR replaces.\n"
    )


@pytest.mark.parametrize(
    'command, sentence',
    [
        (('train.py', 'absent.py'), 'The configuration absent.py does not exist; '),
        (('test.py', 'toy_config.py', 'absent.pth'), 'The weight file absent.pth does not exist; '),
        (
            ('train.py', 'toy_config.py', '--data-root', 'absent'),
            'The folder absent given by --data-root does not exist.',
        ),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(tmp_path, toy, command, sentence):
    result = run(TOOLS / command[0], *command[1:], folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.startswith(sentence) and result.stderr.count('\n') == 1


@pytest.mark.slow
def test_training_on_two_cpu_processes_equals_one(tmp_path, toy, port):
    one = run(TOOLS / 'train.py', toy, '--work-dir', 'one', folder=tmp_path)
    two = run(
        TOOLS / 'dist_train.sh',
        toy,
        '2',
        '--work-dir',
        'two',
        '--cfg-options',
        'train_dataloader.batch_size=1',
        folder=tmp_path,
        PORT=port,
    )
    assert len(metrics(one)) == 2
    assert metrics(two) == metrics(one)
    torch.testing.assert_close(weights(tmp_path / 'two' / 'epoch_2.pth'), weights(tmp_path / 'one' / 'epoch_2.pth'))


@pytest.mark.slow
def test_syncbn_trains_on_two_cpu_processes_and_tests_alike_on_one(tmp_path, toy, port):
    toy.write_text(CONFIG.replace('norm_cfg=None', "norm_cfg=dict(type='SyncBN')"))
    trained = run(TOOLS / 'dist_train.sh', toy, '2', '--work-dir', 'a', folder=tmp_path, PORT=port)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert trained.stdout.count('SyncBN needs GPUs') == 1
    checkpoint = tmp_path / 'a' / 'epoch_2.pth'
    two = run(TOOLS / 'dist_test.sh', toy, checkpoint, '2', folder=tmp_path, PORT=port)
    one = run(TOOLS / 'test.py', toy, checkpoint, folder=tmp_path)
    # The last validation of the training, too: the statistics were averaged before both.
    assert metrics(one) == metrics(two) == metrics(trained)[-1:]


@pytest.mark.parametrize(
    'name, arguments', [('dist_train.sh', 2), ('dist_test.sh', 3), ('slurm_train.sh', 4), ('slurm_test.sh', 4)]
)
def test_shells_tell_their_usage(tmp_path, name, arguments):
    result = run(TOOLS / name, *['a'] * (arguments - 1), folder=tmp_path)
    assert result.returncode == 2
    assert re.match(rf'usage: \S*{name} ', result.stderr)


@pytest.mark.parametrize(
    'name, arguments, expected',
    [
        (
            'slurm_train.sh',
            ['part', 'job', 'c.py', 'work', '--amp'],
            'train.py c.py --work-dir work --launcher slurm --amp',
        ),
        ('slurm_test.sh', ['part', 'job', 'c.py', 'c.pth', '--tta'], 'test.py c.py c.pth --launcher slurm --tta'),
    ],
)
def test_slurm_jobs_get_one_task_for_each_gpu(tmp_path, name, arguments, expected):
    (tmp_path / 'srun').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    result = run(
        TOOLS / name,
        *arguments,
        folder=tmp_path,
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        GPUS='16',
        SRUN_ARGS='--quotatype auto',
        PYTHON='python3',
    )
    assert result.returncode == 0
    assert result.stdout == (
        '--partition part --job-name job --gres gpu:8 --ntasks 16 --ntasks-per-node 8 --cpus-per-task 5 '
        f'--kill-on-bad-exit=1 --quotatype auto python3 -u {TOOLS}/{expected}\n'
    )
