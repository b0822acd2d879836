import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.device import get_device

from mmengine_overlock import amp
from mmengine_overlock.run import train
from overlock.utils.errors import UserError


def config(**optim_wrapper):
    return Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD'), **optim_wrapper)))


def test_training_computes_in_bfloat16_and_learns(write_toy):
    runner = train(write_toy(), amp=True)
    losses = runner.message_hub.get_scalar('train/loss').data[0]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) / 2
    runner.model.train()
    with runner.optim_wrapper.optim_context(runner.model):
        features = runner.model.backbone(torch.randn(2, 4, device=get_device()))
        assert features.dtype == torch.bfloat16
        assert runner.model.toy_head(features).dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in runner.model.parameters())


@pytest.mark.parametrize(
    'has_bfloat16, expected',
    [
        (True, dict(type='BFloat16OptimWrapper')),
        (False, dict(type='AmpOptimWrapper', dtype='float16', loss_scale='dynamic')),
    ],
)
def test_a_gpu_without_bfloat16_gets_float16_with_a_loss_scale(monkeypatch, has_bfloat16, expected):
    monkeypatch.setattr(amp, 'get_device', lambda: 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation: has_bfloat16)
    cfg = config(type='OptimWrapper')
    amp.enable_amp(cfg)
    assert cfg.optim_wrapper == dict(optimizer=dict(type='SGD'), **expected)


def test_a_configuration_in_mixed_precision_stays_as_it_is():
    cfg = config(type='AmpOptimWrapper', dtype='float16')
    amp.enable_amp(cfg)
    assert cfg.optim_wrapper.dtype == 'float16'


def test_an_optimizer_wrapper_of_ones_own_is_refused():
    with pytest.raises(UserError, match='--amp works with the optimizer wrapper OptimWrapper, got ApexOptimWrapper'):
        amp.enable_amp(config(type='ApexOptimWrapper'))


def test_necks_and_heads_give_float32():
    class Cascade(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = torch.nn.Linear(4, 4)
            self.bbox_head = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(2)])
            self.other = torch.nn.Linear(4, 4)

    model = Cascade().to(get_device())
    wrapper = amp.BFloat16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with wrapper.optim_context(model):
        x = torch.randn(2, 4, device=get_device())
        assert model.other(x).dtype == torch.bfloat16
        assert model.neck(x).dtype == model.bbox_head[1](x).dtype == torch.float32
