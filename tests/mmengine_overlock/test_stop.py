import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mmengine_overlock.run import train
from tests.mmengine_overlock.runs import EVERYTHING, WORKERS, assert_equal, saved, start, statuses, wait_for
from tests.testing import ROOT

pytestmark = pytest.mark.usefixtures('quick_saves')

SLOWLY = "train_dataloader['dataset'].update(delay=0.03)\n"


def stop_and_resume(write_toy, folder, number, more='', by_iteration=False, processes=1, sent_to=-1, after=3):
    """Train, stop by a signal to one process, and resume: the exit codes, the stopped iteration, the last file."""
    config = write_toy(EVERYTHING + SLOWLY + more, by_iteration)
    running = start(config, folder, processes)
    wait_for(folder / f'iter_{after}.pth')
    os.kill(running[sent_to].pid, number)
    codes = statuses(running)
    stopped = torch.load(folder / 'interrupted.pth', weights_only=False)['meta']['iter']
    assert (
        statuses(start(write_toy(EVERYTHING + more, by_iteration), folder, processes, resume='auto')) == [0] * processes
    )
    return codes, stopped, folder / f'iter_{12 if by_iteration else 24 // processes}.pth'


@pytest.mark.parametrize('number, status', [('SIGTERM', 143), ('SIGUSR1', 143), ('SIGINT', 130)])
@pytest.mark.parametrize('by_iteration', [False, True], ids=['epochs', 'iterations'])
def test_a_signal_saves_and_the_resumed_run_equals_the_uninterrupted(
    write_toy, tmp_path, capfd, number, status, by_iteration
):
    codes, stopped, last = stop_and_resume(
        write_toy, tmp_path / 'a', getattr(signal, number), by_iteration=by_iteration
    )
    assert codes == [status] and 3 <= stopped < 12
    out, err = capfd.readouterr()
    path, iterations = tmp_path / 'a' / 'interrupted.pth', 12 if by_iteration else 24
    told = f'Stopped after iteration {stopped} of {iterations} and saved {path}; to go on, give the same command with'
    assert (out + err).count(told) == 1 and 'Traceback' not in err
    train(write_toy(EVERYTHING, by_iteration), work_dir=tmp_path / 'whole')
    assert_equal(saved(last), saved(tmp_path / 'whole' / last.name))


@pytest.mark.parametrize('by_iteration', [False, True], ids=['epochs', 'iterations'])
def test_a_signal_to_one_of_two_processes_stops_both(write_toy, tmp_path, by_iteration):
    codes, stopped, last = stop_and_resume(
        write_toy, tmp_path / 'a', signal.SIGTERM, by_iteration=by_iteration, processes=2
    )
    assert codes == [143, 143] and stopped >= 3
    assert statuses(start(write_toy(EVERYTHING, by_iteration), tmp_path / 'whole', 2)) == [0, 0]
    assert_equal(saved(last), saved(tmp_path / 'whole' / last.name))


def test_workers_outlive_a_signal_to_everybody(write_toy, tmp_path):
    config = write_toy(EVERYTHING + WORKERS + SLOWLY + 'train_cfg.update(val_interval=1)\n')
    (running,) = start(config, tmp_path / 'a')
    wait_for(tmp_path / 'a' / 'iter_7.pth')
    workers = subprocess.run(['pgrep', '-P', str(running.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) >= 3
    for pid in [*workers, running.pid]:
        os.kill(int(pid), signal.SIGTERM)
    assert statuses([running]) == [143]
    assert torch.load(tmp_path / 'a' / 'interrupted.pth', weights_only=False)['meta']['iter'] >= 7
    # They end with their process.
    time.sleep(0.1)
    assert not [pid for pid in workers if os.path.exists(f'/proc/{pid}')]


@pytest.mark.parametrize('number, status', [('SIGTERM', 143), ('SIGINT', 130)])
def test_a_signal_during_the_validation_saves_the_weights_behind_the_average(write_toy, tmp_path, number, status):
    slow = "train_cfg.update(val_interval=1)\nval_dataloader['dataset'] = dict(type='ToyDataset', delay=0.02)\n"
    once = slow + "default_hooks['checkpoint'].update(by_epoch=True)\n"
    codes, stopped = stop_during_validation(write_toy, tmp_path / 'a', once, getattr(signal, number))
    assert codes == [status] and stopped == 12
    train(write_toy(EVERYTHING + once.replace('0.02', '0.0')), work_dir=tmp_path / 'whole')
    assert_equal(saved(tmp_path / 'a' / 'epoch_4.pth'), saved(tmp_path / 'whole' / 'epoch_4.pth'))


def stop_during_validation(write_toy, folder, more, number):
    (running,) = start(write_toy(EVERYTHING + more), folder)
    wait_for(folder / 'epoch_2.pth')
    time.sleep(0.05)
    os.kill(running.pid, number)
    codes = statuses([running])
    stopped = torch.load(folder / 'interrupted.pth', weights_only=False)['meta']['iter']
    resumed = statuses(start(write_toy(EVERYTHING + more.replace('0.02', '0.0')), folder, resume='auto'))
    assert resumed == [0]
    return codes, stopped


def test_a_stop_waits_for_the_gradients_of_further_iterations(write_toy, tmp_path):
    more = "optim_wrapper['accumulative_counts'] = 4\n"
    codes, stopped, last = stop_and_resume(write_toy, tmp_path / 'a', signal.SIGTERM, more, after=5)
    assert codes == [143] and stopped % 4 == 0 and stopped < 24
    train(write_toy(EVERYTHING + more), work_dir=tmp_path / 'whole')
    assert_equal(saved(last), saved(tmp_path / 'whole' / last.name))


def test_an_interrupt_before_the_first_iteration_ends_the_run_at_once(write_toy, tmp_path, capfd):
    config = write_toy(EVERYTHING + "train_dataloader['dataset'].update(delay=20.0)\n")
    (running,) = start(config, tmp_path / 'a')
    wait_for(tmp_path / 'a' / config.name)
    time.sleep(0.5)
    os.kill(running.pid, signal.SIGINT)
    # torchrun passes the same Ctrl-C on.
    os.kill(running.pid, signal.SIGINT)
    assert statuses([running], timeout=5) == [130]
    assert capfd.readouterr().err == '\nInterrupted: nothing was saved.\n'
    assert not (tmp_path / 'a' / 'interrupted.pth').exists()


def test_a_second_interrupt_ends_the_run_at_once(write_toy, tmp_path, capfd):
    config = write_toy(EVERYTHING + "train_dataloader['dataset'].update(delay=1.5)\n")
    (running,) = start(config, tmp_path / 'a')
    first = tmp_path / 'a' / 'iter_1.pth'
    wait_for(first)
    # The second iteration.
    time.sleep(0.3)
    os.kill(running.pid, signal.SIGINT)
    os.kill(running.pid, signal.SIGINT)
    time.sleep(1.2)
    assert running.is_alive()
    os.kill(running.pid, signal.SIGINT)
    assert statuses([running], timeout=5) == [130]
    err = capfd.readouterr().err
    assert err.count('Stopping after this iteration, to save it; Ctrl-C again stops at once.') == 1
    told = f'Interrupted: the last checkpoint is {first}; to go on, give the same command with --resume.'
    assert err.count(told) == 1 and 'Traceback' not in err
    assert not (tmp_path / 'a' / 'interrupted.pth').exists()


def test_an_interrupted_test_is_told_in_one_line(write_toy, tmp_path):
    train(write_toy(), work_dir=tmp_path / 'a')
    slowly = "test_dataloader.update(num_workers=1, dataset=dict(type='ToyDataset', delay=20.0))\n"
    command = [sys.executable, ROOT / 'tools/test.py', write_toy(slowly), tmp_path / 'a' / 'epoch_4.pth']
    environ = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONFAULTHANDLER='1')
    # Processes of one group, as a terminal interrupts them all; what a shell runs in the background ignores that.
    running = subprocess.Popen(
        command,
        env=environ,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 60
    while not subprocess.run(['pgrep', '-P', str(running.pid)], capture_output=True).stdout:
        assert time.monotonic() < end and running.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(running.pid, signal.SIGINT)
    try:
        err = running.communicate(timeout=20)[1]
    except subprocess.TimeoutExpired:
        # Where it hangs is then told.
        running.send_signal(signal.SIGABRT)
        err = running.communicate()[1]
    assert (running.returncode, err) == (130, '\nInterrupted: what this command makes is not complete.\n')


def test_handlers_are_put_back(write_toy, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    train(write_toy(), work_dir=tmp_path / 'a')
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
