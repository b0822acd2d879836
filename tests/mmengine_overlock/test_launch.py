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
        launch.prepare_launch(Config(dict(launcher='pytorch', model=dict())))
