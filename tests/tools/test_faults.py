"""Distributed trainings that are stopped, lose a process, or fail on one machine alone."""

import os
import signal
import subprocess
import time

import pytest
import torch

from tests.toy import write_config

pytestmark = pytest.mark.slow

SLOWLY = """
loader['dataset']['delay'] = 0.02
default_hooks['checkpoint'] = dict(type='CheckpointHook', by_epoch=False, interval=1)
train_cfg.update(max_epochs=20)
"""


@pytest.fixture
def begin(tmp_path, start_tool):
    """Start a script with its errors in a file, and go on."""
    started = []

    def begin(name, *arguments, **environment):
        log = (tmp_path / f'log{len(started)}').open('w+')

        def run(command, **how):
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **how)

        process = start_tool(name, *arguments, run=run, **environment)
        process.log = log
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.log.close()


def output(process):
    process.log.seek(0)
    return process.log.read()


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end and process.poll() is None, output(process)
        time.sleep(0.05)


def processes(parent):
    return [int(pid) for pid in subprocess.run(['pgrep', '-P', str(parent)], capture_output=True).stdout.split()]


def test_a_stopped_distributed_training_ends_with_143_and_says_how_to_go_on(tmp_path, port, begin, start_tool):
    config = write_config(tmp_path, SLOWLY)
    running = begin('dist_train.sh', config, 2, '--work-dir', 'a', PORT=port)
    wait_for(tmp_path / 'a' / 'iter_3.pth', running)
    os.kill(running.pid, signal.SIGUSR1)
    assert running.wait(60) == 143
    assert output(running).count('to go on, give the same command with --resume') == 1
    stopped = torch.load(tmp_path / 'a' / 'interrupted.pth', weights_only=False)['meta']['iter']
    assert 3 <= stopped < 80
    options = ('--work-dir', 'a', '--resume', '--cfg-options', 'train_cfg.max_epochs=3')
    resumed = start_tool('dist_train.sh', config, 2, *options, PORT=port)
    assert resumed.returncode == 0 and (tmp_path / 'a' / 'iter_12.pth').exists(), resumed.stderr


def test_a_killed_process_ends_the_job_within_seconds(tmp_path, port, begin):
    running = begin('dist_train.sh', write_config(tmp_path, SLOWLY), 2, '--work-dir', 'a', PORT=port)
    wait_for(tmp_path / 'a' / 'iter_3.pth', running)
    os.kill(processes(running.pid)[1], signal.SIGKILL)
    begun = time.monotonic()
    assert running.wait(60) not in (0, 143)
    assert time.monotonic() - begun < 20


def test_a_mistake_on_one_machine_ends_the_others(tmp_path, port, begin):
    config = write_config(tmp_path, SLOWLY)
    machines = [
        begin('dist_train.sh', config, 1, '--work-dir', 'a', *more, NNODES='2', NODE_RANK=str(rank), PORT=port)
        for rank, more in enumerate([(), ('--weights', 'absent.pth')])
    ]
    assert machines[1].wait(120) != 0
    begun = time.monotonic()
    assert machines[0].wait(120) != 0
    assert time.monotonic() - begun < 20
    sentence = 'The weight file absent.pth does not exist'
    assert f'\n{sentence}' in f'\n{output(machines[1])}'
    told = output(machines[0])
    assert sentence in told and 'Process 1 on ' in told and 'mmengine' not in told
