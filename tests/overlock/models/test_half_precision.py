"""Every variant runs and trains in half precision, also where a sum in float16 would leave its range."""

import pytest
import torch
from torch import nn

from benchmarks.presets import randomise
from overlock import MogaNet, OverLoCK
from overlock.layers import GRN, SqueezeExcite
from overlock.utils.finite import non_finite

# The smallest variants at the size that they are published for, the others at 64 pixels.
VARIANTS = [
    ('OverLoCK-XT', lambda: OverLoCK('xt'), 224),
    *((f'OverLoCK-{name.upper()}', lambda name=name: OverLoCK(name), 64) for name in ('t', 's', 'b')),
    ('MogaNet-XT', lambda: MogaNet('xt'), 224),
    *((f'MogaNet-{name.upper()}', lambda name=name: MogaNet(name), 64) for name in ('t', 's', 'b', 'l', 'xl')),
]
LARGEST = torch.finfo(torch.float16).max


def build(make):
    """A network with weights as large as trained ones, whose hidden maps are eight times as large."""
    model = make()
    randomise(model)
    for name, module in model.named_modules():
        if name.endswith('fc1') and isinstance(module, nn.Conv2d):
            module.weight.data.mul_(8)
    return model


def watch_sums(model):
    """Return a dict that is filled with the largest sums that norms and means form, by layer type."""
    sums = {}

    def note(module, inputs):
        x = inputs[0].detach().double()
        # The sum of squares of a norm or variance, or the sum of a mean.
        terms = x.abs().sum((2, 3)) if isinstance(module, SqueezeExcite) else x.square().sum((2, 3))
        name = type(module).__name__
        sums[name] = max(sums.get(name, 0), terms.max().item())

    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, GRN, SqueezeExcite)):
            module.register_forward_pre_hook(note)
    return sums


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(('make', 'size'), [v[1:] for v in VARIANTS], ids=[f'{v[0]} at {v[2]}' for v in VARIANTS])
def test_forward_and_training_are_finite(make, size, dtype):
    model = build(make)
    sums = watch_sums(model)
    images = 4 * torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.autocast('cpu', dtype):
        model.train()
        logits = model(images)
        logits = logits if isinstance(logits, dict) else {'main': logits}
        loss = sum(value.float().logsumexp(1).mean() for value in logits.values())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert loss.isfinite() and all(gradient is not None for gradient in gradients.values())
    assert not non_finite(gradients) and not non_finite(model.state_dict())
    assert sums['BatchNorm2d'] > LARGEST
    if size == 224 and isinstance(model, OverLoCK):
        assert sums['GRN'] > LARGEST
    model.eval()
    with torch.no_grad():
        with torch.autocast('cpu', dtype):
            assert model(images[:1]).isfinite().all()
        # Without autocast, all of it in half precision.
        assert model.to(dtype)(images[:1].to(dtype)).isfinite().all()
