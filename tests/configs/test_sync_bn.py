"""BatchNorms in runs of several processes: synchronized on GPUs, by process on CPUs."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner, runner
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from mmengine_overlock import launch
from tests.configs.testing import build_meta, load_config

NAMES = ['mask_rcnn_overlock_xt_1x', 'cascade_overlock_xt_3x', 'upernet_overlock_xt_160k']


@MODEL_WRAPPERS.register_module(force=True)
class Unwrapped:
    """Stands for DistributedDataParallel, which needs a GPU for SyncBatchNorm."""

    def __new__(cls, module):
        return module


def wrapped(cfg, distributed: bool, monkeypatch) -> tuple[torch.nn.Module, list[str]]:
    """Return what mmengine's runner makes of a configuration's model on the meta device, and the model's own names."""
    model = build_meta(cfg)
    names = list(model.state_dict())
    monkeypatch.setattr(runner, 'get_device', lambda: 'meta')
    stub = SimpleNamespace(cfg=cfg, distributed=distributed, logger=MMLogger.get_current_instance())
    return Runner.wrap_model(stub, dict(type='Unwrapped'), model), names


@pytest.mark.parametrize('name', NAMES)
def test_distributed_training_synchronizes_every_batch_norm(name, monkeypatch):
    model, names = wrapped(load_config(name), True, monkeypatch)
    norms = [module for module in model.backbone.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) > 100
    assert all(isinstance(module, SyncBatchNorm) for module in model.modules() if isinstance(module, _BatchNorm))
    assert list(model.state_dict()) == names
    # A synchronized backbone folds for inference like any other.
    model.backbone.to_empty(device='cpu').eval().switch_to_deploy()
    assert not any(isinstance(module, _BatchNorm) for module in model.backbone.modules())


@pytest.mark.parametrize('name', NAMES)
def test_training_without_a_launcher_synchronizes_nothing(name, monkeypatch):
    model, names = wrapped(load_config(name), False, monkeypatch)
    assert any(isinstance(module, _BatchNorm) for module in model.backbone.modules())
    assert not any(isinstance(module, SyncBatchNorm) for module in model.modules())
    assert list(model.state_dict()) == names


@pytest.mark.parametrize('name', NAMES)
def test_on_cpus_nothing_is_synchronized_and_a_warning_says_so(name, monkeypatch):
    said = []
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(launch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(launch, 'print_log', lambda message, *_: said.append(message))
    for variable in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.setenv(variable, '0')
    cfg = load_config(name)
    assert cfg.sync_bn == 'torch'
    cfg.launcher = 'pytorch'
    launch.prepare_launch(cfg)
    assert cfg.sync_bn is None
    assert len(said) == 1 and said[0].startswith('SyncBN needs GPUs')
    model, _ = wrapped(cfg, True, monkeypatch)
    assert not any(isinstance(module, SyncBatchNorm) for module in model.modules())
