import os
import re
import socket
import time
from multiprocessing import get_context

import pytest
import torch
from mmengine.config import Config

from mmengine_overlock import launch
from overlock.utils.errors import UserError


def test_without_a_launcher_nothing_changes():
    cfg = Config(dict(launcher='none', model=dict(norm_cfg=dict(type='SyncBN'))))
    before = cfg.to_dict()
    launch.prepare_launch(cfg)
    assert cfg.to_dict() == before


def test_more_processes_than_gpus_is_one_sentence(monkeypatch):
    for name, value in (('RANK', '0'), ('WORLD_SIZE', '4'), ('LOCAL_RANK', '0'), ('LOCAL_WORLD_SIZE', '4')):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match='There are 4 processes on this machine, but each sees 2 GPUs'):
        with launch.agreed('pytorch'):
            pass


@pytest.mark.parametrize('failing', [None, 0, 1])
def test_processes_learn_what_one_of_them_met(failing):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    context = get_context('fork')
    met = context.Queue()

    def run(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK='0', WORLD_SIZE='3', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        try:
            with launch.agreed('pytorch'):
                if rank == failing:
                    raise UserError('It is raining.')
            message = 'none'
        except UserError as error:
            message = str(error)
        met.put((rank, message))
        # The first process keeps the store.
        time.sleep(1)

    processes = [context.Process(target=run, args=(rank,)) for rank in range(3)]
    for process in processes:
        process.start()
    messages = dict(met.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    if failing is None:
        assert set(messages.values()) == {'none'}
    else:
        assert messages.pop(failing) == 'It is raining.'
        (told,) = set(messages.values())
        assert re.fullmatch(rf'Process {failing} on \S+: It is raining\.', told)
