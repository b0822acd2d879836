"""BatchNorms in runs of several processes are synchronized, on GPUs and CPUs."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import MODEL_WRAPPERS, MODELS, DefaultScope
from mmengine.runner import Runner, runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import distributed, multiprocessing
from torch.nn import Module
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from mmengine_overlock import launch
from overlock import Arch
from overlock.layers.sync_norm import CPUSyncBatchNorm
from overlock.utils.distributed import leave_group
from tests.configs.testing import build_meta, load_config
from tests.testing import TINY

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
def test_on_cpus_every_batch_norm_is_synchronized_too(name, monkeypatch):
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(launch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(launch.MMDistributedDataParallel, '__init__', lambda self, module, **_: Module.__init__(self))
    for variable in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.setenv(variable, '0')
    cfg = load_config(name)
    cfg.launcher = 'pytorch'
    launch.prepare_launch(cfg)
    model, names = wrapped(cfg, True, monkeypatch)
    MODEL_WRAPPERS.build(dict(cfg.model_wrapper_cfg, module=model))
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) > 100 and {type(module) for module in norms} == {CPUSyncBatchNorm}
    assert list(model.state_dict()) == names


def _model(name):
    """Return a small model of a configuration, in float64 and without anything random."""
    cfg = load_config(name)
    cfg.model.backbone.update(arch=TINY, drop_path_rate=0.0, init_cfg=None)
    channels = Arch(**TINY).out_channels
    if name.startswith('upernet'):
        cfg.model.decode_head.update(in_channels=list(channels), channels=16, dropout_ratio=0.0)
        cfg.model.auxiliary_head.update(in_channels=channels[2], channels=16, dropout_ratio=0.0)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        # Of a detector the backbone alone: proposals are drawn at random.
        return (model if name.startswith('upernet') else model.backbone).double()


def _train(model, name, images, labels):
    """Take three steps of gradient descent."""
    raw = model.module if isinstance(model, launch.CPUDistributedDataParallel) else model
    optimizer = torch.optim.SGD(raw.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        if name.startswith('upernet'):
            samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels[step]]
            losses = model(images[step], samples, mode='loss')
            loss = sum(value for key, value in losses.items() if 'loss' in key)
        else:
            loss = sum(out.square().mean() for out in model(images[step]))
        loss.backward()
        optimizer.step()
    return dict(raw.state_dict())


def _data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 4, 3, 64, 64, dtype=torch.float64, generator=generator)
    return images, torch.randint(150, (3, 4, 64, 64), generator=generator)


def _share(rank, name, folder):
    distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = launch.CPUDistributedDataParallel(convert_sync_batchnorm(_model(name), 'torch'))
    images, labels = _data()
    torch.save(_train(model, name, images[:, rank::2], labels[:, rank::2]), f'{folder}/{rank}.pth')
    leave_group()


@pytest.mark.slow
@pytest.mark.parametrize('name', [NAMES[0], NAMES[2]])
def test_two_processes_with_half_the_images_each_learn_what_one_learns_of_all(name, tmp_path):
    multiprocessing.spawn(_share, (name, str(tmp_path)), nprocs=2)
    one = _train(_model(name).train(), name, *_data())
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f'{rank}.pth'), one, rtol=0, atol=1e-5)
