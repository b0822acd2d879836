from types import SimpleNamespace

import torch

from mmengine_overlock import hooks


def test_boxes_only_turns_every_mask_head_off():
    class RoIHead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mask_head = torch.nn.Linear(1, 1)

    model = torch.nn.Sequential(RoIHead())
    hooks.BoxesOnlyHook().before_test(SimpleNamespace(model=model))
    assert model[0].mask_head is None


def test_validation_takes_the_statistics_of_the_first_process(monkeypatch):
    sent = []
    monkeypatch.setattr(hooks, 'broadcast', sent.append)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    hooks.BroadcastBuffersHook().before_val_epoch(SimpleNamespace(model=model))
    assert [id(buffer) for buffer in sent] == [id(buffer) for buffer in model.buffers()] and len(sent) == 3
