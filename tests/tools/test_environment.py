"""What machines lack is told in one sentence, and nothing that was written before is lost."""

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from demo.detector import draw
from tests.testing import ROOT
from tests.toy import ToyDataset, ToyModel, write_config

# About a megabyte for each checkpoint.
WIDE = ['--cfg-options', 'model.backbone.width=20000', 'optim_wrapper.optimizer.lr=1e-6']
SENTENCES = dict(
    full='The disk is full; free space or name another folder; what was written before is whole',
    read_only='A file or folder cannot be read or written; ',
    file='A file stands where a folder is needed; remove it, or name another folder (',
    memory='The memory does not suffice; lower the batch size, the image size ',
    shared='The shared memory of this machine or container is full; enlarge /dev/shm ',
    other='Another process of this run ended or cannot be reached; its own last words say why (',
    port='The port of this run is in use by another program; name a free one: PORT=29501 ',
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A configuration of two epochs, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return write_config(tmp_path, 'train_cfg.update(max_epochs=2, val_interval=1)\n')


def assert_told(ended, sentence, *others):
    """Check that a tool ended with a sentence and code 2; processes beside the one that says it may have others."""
    code, out, err = ended
    assert code == 2, out + err
    assert 'Traceback' not in out + err
    # torch warns at its first call in a process, and torchrun logs which process ended.
    told = [line for line in err.splitlines() if 'warn' not in line.lower() and not re.match(r'[EW]\d{4} ', line)]
    names = [next((name for name in SENTENCES if line.startswith(SENTENCES[name])), line) for line in told]
    assert names.count(sentence) == 1 and set(names) <= {sentence, *others}


def checkpoint(folder, epoch):
    return torch.load(folder / f'epoch_{epoch}.pth', weights_only=False)


@pytest.mark.parametrize('left', [2**19, 0], ids=['for a checkpoint', 'for the log'])
def test_a_full_disk_ends_a_run_and_costs_no_checkpoint(toy, run_tool, disk, monkeypatch, left):
    work, whole, forward = disk.folder / 'w', toy.parent / 'whole', ToyModel.forward

    def fill_then_forward(self, *args, **kwargs):
        if (work / 'epoch_1.pth').exists() and not disk.filled:
            disk.fill(left)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ToyModel, 'forward', fill_then_forward)
        assert_told(run_tool('train', toy, '--work-dir', work, *WIDE), 'full')
    # The part of the second that was written does not stay.
    assert {path.name for path in work.iterdir() if 'epoch' in path.name} == {'epoch_1.pth'}
    disk.free()
    assert run_tool('train', toy, '--work-dir', work, *WIDE, '--resume')[0] == 0
    assert run_tool('train', toy, '--work-dir', whole, *WIDE)[0] == 0
    ours, expected = (checkpoint(folder, 2)['state_dict'] for folder in (work, whole))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def assert_refused(ended, folder):
    code, _, err = ended
    assert code == 2 and err.startswith(f'{folder} cannot be written (') and err.count('\n') == 1, err


def test_a_work_folder_that_cannot_be_written(toy, run_tool, disk):
    assert run_tool('train', toy, '--work-dir', 'w')[0] == 0
    folder = disk.protect() / 'w'
    assert_refused(run_tool('train', toy, '--work-dir', folder), folder)
    assert_told(run_tool('test', toy, 'w/epoch_2.pth', '--work-dir', folder), 'read_only')


@pytest.mark.parametrize('folder', ['a', 'a/w'])
def test_a_work_folder_that_is_a_file(toy, run_tool, tmp_path, folder):
    assert run_tool('train', toy, '--work-dir', 'w')[0] == 0
    (tmp_path / 'a').write_text('precious')
    assert_refused(run_tool('train', toy, '--work-dir', folder), folder)
    assert_told(run_tool('test', toy, 'w/epoch_2.pth', '--work-dir', folder), 'file')
    assert (tmp_path / 'a').read_text() == 'precious'


def test_outputs_that_cannot_be_written_are_told_before_the_test(toy, run_tool, disk, monkeypatch):
    assert run_tool('train', toy, '--work-dir', 'w')[0] == 0
    folder = disk.protect()
    monkeypatch.setattr(ToyModel, 'forward', lambda *_, **__: pytest.fail('the test ran'))
    code, _, err = run_tool('test', toy, 'w/epoch_2.pth', '--out', folder / 'a.pkl')
    assert code == 2 and err.startswith(f'{folder}/a.pkl cannot be written (')


def test_memory_of_a_gpu(toy, run_tool, monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of')

    monkeypatch.setattr(ToyModel, 'forward', forward)
    assert_told(run_tool('train', toy), 'memory')


LIMITED = """
import resource

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class LimitHook(Hook):
    # All addresses in use and 64 MB more; then a step of the second epoch takes 1 GB.
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == 1:
            used = 4096 * int(open('/proc/self/statm').read().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
            data_batch['inputs'].repeat(2**25, 1)
"""


@pytest.mark.slow
def test_memory_of_the_machine(toy, start_tool, tmp_path):
    (tmp_path / 'limited.py').write_text(LIMITED)
    with toy.open('a') as file:
        file.write("custom_imports['imports'] += ['limited']\ncustom_hooks = [dict(type='LimitHook')]")
    path = f'{ROOT}{os.pathsep}{tmp_path}'
    process = start_tool('train.py', toy, '--work-dir', 'w', PYTHONPATH=path)
    assert_told((process.returncode, process.stdout, process.stderr), 'memory')
    assert checkpoint(tmp_path / 'w', 1)['meta']['epoch'] == 1


ALONE = """
import os

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class AloneHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if os.environ['RANK'] == '1':
            torch.empty(2**50)
"""


@pytest.mark.slow
def test_a_fault_of_one_process_is_told_and_ends_the_others(toy, start_tool, tmp_path, port):
    (tmp_path / 'alone.py').write_text(ALONE)
    with toy.open('a') as file:
        file.write("custom_imports['imports'] += ['alone']\ncustom_hooks = [dict(type='AloneHook')]")
    process = start_tool('dist_train.sh', toy, 2, PORT=port, PYTHONPATH=f'{ROOT}{os.pathsep}{tmp_path}')
    assert_told((process.returncode, process.stdout, process.stderr), 'memory', 'other')


@pytest.mark.parametrize('number, sentence', [(signal.SIGBUS, 'shared'), (signal.SIGKILL, 'memory')])
def test_workers_that_the_system_ends(toy, run_tool, monkeypatch, number, sentence):
    """By SIGBUS where /dev/shm is full, by SIGKILL where the memory is."""
    get = ToyDataset.__getitem__
    kill = lambda self, index: os.kill(os.getpid(), number) if get_worker_info() else get(self, index)  # noqa: E731
    monkeypatch.setattr(ToyDataset, '__getitem__', kill)
    assert_told(run_tool('train', toy, '--cfg-options', 'train_dataloader.num_workers=1'), sentence)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dist_train.sh', 'train.py'])
def test_a_port_in_use(toy, start_tool, name):
    with socket.socket() as other:
        other.bind(('', 0))
        other.listen()
        port = str(other.getsockname()[1])
        if name == 'train.py':
            slurm = dict(SLURM_PROCID='0', SLURM_NTASKS='2', SLURM_LOCALID='0', MASTER_PORT=port)
            process = start_tool(name, toy, '--launcher', 'slurm', **slurm)
        else:
            process = start_tool(name, toy, 2, PORT=port)
    assert_told((process.returncode, process.stdout, process.stderr), 'port')


def test_sharded_training_is_refused(toy, run_tool):
    for option in ('runner_type=FlexibleRunner', 'model_wrapper_cfg.type=MMFullyShardedDataParallel'):
        code, _, err = run_tool('train', toy, '--cfg-options', option)
        assert code == 2
        assert err.startswith(f'{toy} asks for sharded training by {option.split("=")[1]}, which is not supported; ')


@pytest.mark.slow
def test_training_needs_neither_a_home_nor_caches(toy, start_tool, tmp_path, disk, monkeypatch):
    names, folder = ('HOME', 'XDG_CACHE_HOME', 'TORCH_HOME', 'OVERLOCK_CACHE', 'MPLCONFIGDIR'), str(disk.protect())
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for environment in ({}, dict.fromkeys(names, folder)):
        process = start_tool('train.py', toy, **environment)
        assert process.returncode == 0, process.stderr
    assert not (tmp_path / '~').exists()


def test_a_cache_that_cannot_be_written(toy, run_tool, disk, monkeypatch):
    folder = disk.protect()
    monkeypatch.setenv('TORCH_HOME', str(folder))
    code, _, err = run_tool('train', toy, '--weights', 'overlock_xt_in1k')
    assert code == 2 and err.count('\n') == 1
    assert err.startswith('cannot download ') and f'{folder}/hub' in err and 'OVERLOCK_WEIGHTS' in err
    monkeypatch.setenv('OVERLOCK_CACHE', str(folder))
    command = [sys.executable, '-m', 'overlock.ops.build']
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith('the C++ operators were not compiled; all runs without them, ')


@pytest.mark.parametrize('name', ['my data', 'Übung', '学習', '🦉', "it's", 'a,b=c [d] #e%f'])
def test_paths_of_every_script_from_another_folder(tmp_path, monkeypatch, run_tool, name):
    """Configuration, work folder and checkpoint."""
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    folder = tmp_path / name
    folder.mkdir()
    config = write_config(folder, 'train_cfg.update(max_epochs=2, val_interval=1)\n').rename(folder / f'{name}.py')
    for options in ([], ['--resume'], ['--resume', folder / name / 'epoch_1.pth'], ['--tensorboard']):
        code, out, err = run_tool('train', config, '--work-dir', folder / name, *options)
        assert code == 0, out + err
    assert checkpoint(folder / name, 2)['meta']['epoch'] == 2
    code, out, err = run_tool('test', config, folder / name / 'epoch_2.pth')
    assert code == 0, out + err
    # By default the work folder lies below the current one.
    assert {path.name for path in Path('work_dirs').iterdir()} == {name}


@pytest.mark.slow
def test_a_detector_trains_and_tests_where_every_path_has_spaces_and_other_scripts(tmp_path, start_tool, port):
    """Checkout, images, annotations, work folder, predictions and drawings; two processes, by the shell script."""
    folder = tmp_path / 'Übung 1' / "学習's 🦉"
    data, work = draw(folder / 'data', train=5, val=5, size=64) / 'coco', folder / 'w'
    (folder / 'check out').symlink_to(ROOT)
    tools, config = folder / 'check out' / 'tools', folder / 'check out' / 'configs/demo/cascade_overlock_xt_shapes.py'
    small = ['train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=1']
    small = ['--data-root', data, '--work-dir', work, '--cfg-options', *small, 'default_hooks.checkpoint.interval=2']
    trained = start_tool(str(tools / 'dist_train.sh'), config, 2, *small, PORT=port)
    assert trained.returncode == 0, trained.stderr
    shown = ['--out', work / 'ö.pkl', '--show-dir', work / '絵']
    tested = start_tool(str(tools / 'test.py'), config, work / 'iter_2.pth', *shown, *small)
    assert tested.returncode == 0, tested.stderr
    assert len(pickle.loads((work / 'ö.pkl').read_bytes())) == 5
    assert {path.suffix for path in (work / '絵').iterdir()} == {'.jpg'} and len(list((work / '絵').iterdir())) == 5
