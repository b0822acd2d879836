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
