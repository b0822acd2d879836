"""Runs with every kind of state and of randomness: started in processes of their own, and compared to the bit."""

import os
import socket
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from mmengine_overlock.run import train
from overlock.utils.distributed import exit_on_user_error

EVERYTHING = """
model['dropout'] = 0.3
train_dataloader['dataset'] = dict(type='ToyDataset', length=11, noise=0.5)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
default_hooks['checkpoint'] = dict(type='CheckpointHook', by_epoch=False, interval=1, save_best='error', rule='less')
"""
WORKERS = """
train_dataloader.update(num_workers=2, persistent_workers=True)
val_dataloader.update(num_workers=1, persistent_workers=True)
"""


def saved(path):
    """What a checkpoint holds of the state of a run."""
    checkpoint = torch.load(path, weights_only=False)
    logs = checkpoint['message_hub']['log_scalars']
    state = {name: checkpoint[name] for name in ('state_dict', 'ema_state_dict', 'optimizer')}
    state['schedulers'] = [
        {name: value for name, value in scheduler.items() if name != 'param_name'}
        for scheduler in checkpoint['param_schedulers']
    ]
    losses = [list(map(float, logs[name].data[0])) for name in ('train/loss', 'train/lr')]
    return dict(state, losses=losses, best=checkpoint['message_hub']['runtime_info'].get('best_score'))


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def start(config, folder, processes=1, **options):
    """Train in as many forked processes, which end as the tools do."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])

    def run(rank):
        if processes > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes)
            )
            os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        with exit_on_user_error():
            train(config, work_dir=folder, launcher='pytorch' if processes > 1 else 'none', **options)

    started = [get_context('fork').Process(target=run, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    return started


def statuses(processes, timeout=60):
    """Wait for the end of all processes; their exit codes."""
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def wait_for(path: Path, timeout=60):
    end = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < end, f'{path} did not appear'
        time.sleep(0.002)
