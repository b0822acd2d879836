import os
import re
from pathlib import Path

import pytest
import torch

from tests.testing import ROOT
from tests.toy import write_config

COCO = """
default_scope = 'mmdet'
train_dataloader = dict(dataset=dict(type='CocoDataset', data_root='data/coco/', ann_file='annotations/a.json',
                                     data_prefix=dict(img='train/')))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A configuration of two epochs, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, 'train_cfg.update(max_epochs=2, val_interval=1)\n')


def weights(path):
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']


def metrics(code, out, err):
    assert code == 0, out + err
    return re.findall(r'error (\d\.\d{3})  images (\d+)', out)


def ended(process):
    return process.returncode, process.stdout, process.stderr


def test_a_missing_data_set_is_one_sentence_and_code_2(tmp_path, start_tool):
    (tmp_path / 'a.py').write_text(COCO)
    assert ended(start_tool('train.py', 'a.py')) == (
        2,
        '',
        'The train data set cannot be used: data/coco/annotations/a.json does not exist; expected annotations/a.json '
        "in COCO's format and its images in train/, below data/coco/, which --data-root DIR replaces.\n",
    )


def test_a_missing_checkpoint_is_one_sentence_and_code_2(toy, start_tool):
    code, out, err = ended(start_tool('test.py', toy, 'absent.pth'))
    assert (code, out) == (2, '')
    assert err.startswith('The weight file absent.pth does not exist; ') and err.count('\n') == 1


@pytest.mark.parametrize(
    'arguments, sentence',
    [
        (['absent.py'], 'The configuration absent.py does not exist; '),
        (['{toy}', '--data-root', 'absent'], 'The folder absent given by --data-root does not exist.'),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(toy, run_tool, arguments, sentence):
    code, out, err = run_tool('train', *(argument.format(toy=toy) for argument in arguments))
    assert (code, out) == (2, '')
    assert err.startswith(sentence) and err.count('\n') == 1


def test_every_option_reaches_its_function(toy, run_tool, monkeypatch):
    calls = []
    Path('c.py').touch()

    def record(config, **options):
        calls.append({'config': str(config), **options})

    monkeypatch.setattr('mmengine_overlock.run.train', record)
    monkeypatch.setattr('mmengine_overlock.run.test', record)
    common = ['--work-dir', 'w', '--data-root', 'd', '--no-check', '--compile', '--amp']
    common += ['--verbose', '--cfg-options', 'a.b=1', 'c=[x,y]']
    launch = ['--launcher', 'slurm', '--local-rank', '1']
    train = ['--resume', '--auto-scale-lr', '--tensorboard', '--weights', 'f', '--on-nan', 'skip']
    train += ['--wandb', '--mlflow', '--ema', '--early-stop', '3']
    test = ['--out', 'o.pkl', '--show-dir', 's', '--show', '--tta', '--fast']
    assert run_tool('train', 'c.py', *common, *launch, *train) == (0, '', '')
    assert run_tool('test', 'c.py', 'c.pth', *common, *launch, *test) == (0, '', '')
    both = dict(config='c.py', work_dir='w', data_root='d', check=False, compile=True, amp=True, verbose=True)
    both |= dict(coco=None, masks=None)
    both['cfg_options'] = {'a.b': 1, 'c': ['x', 'y']}
    logged = dict(tensorboard=True, wandb=True, mlflow=True, ema=True, early_stop=3)
    assert calls == [
        dict(both, launcher='slurm', resume='auto', auto_scale_lr=True, weights='f', on_nan='skip', **logged),
        dict(both, launcher='slurm', checkpoint='c.pth', out='o.pkl', show_dir='s', show=True, tta=True, fast=True),
    ]


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_a_run_has_one_folder_of_data(toy, run_tool, monkeypatch, tool):
    calls = []
    monkeypatch.setattr(f'mmengine_overlock.run.{tool}', lambda config, **options: calls.append(options))
    given = [toy, *(['c.pth'] if tool == 'test' else [])]
    assert run_tool(tool, *given, '--coco', 'a')[0] == run_tool(tool, *given, '--masks', 'b')[0] == 0
    assert [(call['coco'], call['masks']) for call in calls] == [('a', None), (None, 'b')]
    code, _, err = run_tool(tool, *given, '--coco', 'a', '--masks', 'b')
    assert code == 2 and 'not allowed with argument --coco' in err


@pytest.mark.slow
def test_training_on_two_cpu_processes_equals_one(tmp_path, toy, port, run_tool, start_tool):
    one = run_tool('train', toy, '--work-dir', 'one')
    options = ('--work-dir', 'two', '--cfg-options', 'train_dataloader.batch_size=1')
    two = start_tool('dist_train.sh', toy, 2, *options, PORT=port)
    assert len(metrics(*one)) == 2
    assert metrics(*ended(two)) == metrics(*one)
    torch.testing.assert_close(weights(tmp_path / 'two' / 'epoch_2.pth'), weights(tmp_path / 'one' / 'epoch_2.pth'))


@pytest.mark.slow
def test_syncbn_trains_on_two_cpu_processes_and_tests_alike_on_one(tmp_path, toy, port, run_tool, start_tool):
    toy.write_text(f"{toy.read_text()}model['norm_cfg'] = dict(type='SyncBN')\n")
    trained = start_tool('dist_train.sh', toy, 2, '--work-dir', 'a', PORT=port)
    last = metrics(*ended(trained))[-1:]
    checkpoint = tmp_path / 'a' / 'epoch_2.pth'
    two = start_tool('dist_test.sh', toy, checkpoint, 2, PORT=port)
    # The last validation of the training, too.
    assert metrics(*run_tool('test', toy, checkpoint)) == metrics(*ended(two)) == last


@pytest.mark.parametrize(
    'name, arguments', [('dist_train.sh', 2), ('dist_test.sh', 3), ('slurm_train.sh', 4), ('slurm_test.sh', 4)]
)
def test_shells_tell_their_usage(start_tool, name, arguments):
    code, _, err = ended(start_tool(name, *['a'] * (arguments - 1)))
    assert code == 2
    assert re.match(rf'usage: \S*{name} ', err)


def stub(folder, name, lines):
    (folder / name).write_text(f'#!/bin/sh\n{lines}\n')
    (folder / name).chmod(0o755)


SLURM = dict(GPUS='16', SRUN_ARGS='--quotatype auto', PYTHON='python3', SLURM_JOB_ID='')


def test_slurm_tests_get_one_task_for_each_gpu(tmp_path, start_tool):
    stub(tmp_path, 'srun', 'echo "$@"')
    path = f'{tmp_path}:{os.environ["PATH"]}'
    result = start_tool('slurm_test.sh', 'part', 'job', 'c.py', 'c.pth', '--tta', PATH=path, **SLURM)
    assert ended(result) == (
        0,
        '--partition part --job-name job --gres gpu:8 --ntasks 16 --ntasks-per-node 8 --cpus-per-task 5 '
        f'--kill-on-bad-exit=1 --quotatype auto python3 -u {ROOT}/tools/test.py c.py c.pth --launcher slurm --tta\n',
        '',
    )


def test_slurm_trainings_are_submitted_with_one_task_for_each_gpu(tmp_path, start_tool):
    stub(tmp_path, 'sbatch', 'echo "$OVERLOCK_TOOLS $@"')
    path, arguments = f'{tmp_path}:{os.environ["PATH"]}', ['part', 'job', 'c.py', 'work', '--amp']
    result = start_tool('slurm_train.sh', *arguments, PATH=path, SBATCH_ARGS='--time 60', **SLURM)
    script = ROOT / 'tools' / 'slurm_train.sh'
    assert ended(result) == (
        0,
        f'{ROOT}/tools --partition part --job-name job --gres gpu:8 --ntasks 16 --ntasks-per-node 8 --cpus-per-task 5 '
        f'--time 60 {script} part job c.py work --amp\n',
        '',
    )
    options = [line for line in script.read_text().splitlines() if line.startswith('#SBATCH')]
    assert options == ['#SBATCH --requeue', '#SBATCH --open-mode=append', '#SBATCH --signal=USR1@120']


@pytest.mark.parametrize(
    'status, restarts, cancelled, requeued',
    [
        (143, '', False, True),
        (143, '1', False, True),
        (138, '2', False, True),
        (0, '', False, False),
        (2, '', False, False),
        (143, '', True, False),
    ],
)
def test_a_slurm_job_that_was_stopped_in_time_is_requeued_and_resumes(
    tmp_path, start_tool, status, restarts, cancelled, requeued
):
    stub(tmp_path, 'srun', 'echo "$@"\n' + 'kill -TERM $PPID\n' * cancelled + f'exit {status}')
    stub(tmp_path, 'scontrol', 'echo scontrol "$@"')
    job = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', **{**SLURM, 'SLURM_JOB_ID': '7'}, SLURM_RESTART_COUNT=restarts)
    # The second restart of this list came before the first checkpoint.
    if restarts == '1':
        (tmp_path / 'work').mkdir()
        (tmp_path / 'work' / 'last_checkpoint').touch()
    # Slurm runs a copy of the script.
    job['OVERLOCK_TOOLS'] = '/there'
    code, out, err = ended(start_tool('slurm_train.sh', 'part', 'job', 'c.py', 'work', '--amp', **job))
    resume = ' --resume' if restarts == '1' else ''
    assert (code, err) == (0 if requeued else status, '')
    assert out == (
        '--cpus-per-task 5 --kill-on-bad-exit=1 --quotatype auto python3 -u /there/train.py c.py --work-dir work '
        f'--launcher slurm --amp{resume}\n' + 'scontrol requeue 7\n' * requeued
    )
