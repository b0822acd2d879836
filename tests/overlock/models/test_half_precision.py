"""Every variant runs and trains in half precision, also where a sum of squares leaves the range of float16."""

import pytest
import torch
from torch import nn

from benchmarks.presets import randomise
from overlock import MogaNet, OverLoCK
from overlock.layers import GRN
from overlock.utils.finite import non_finite

VARIANTS = [(OverLoCK, name) for name in ('xt', 't', 's', 'b')]
VARIANTS += [(MogaNet, name) for name in ('xt', 't', 's', 'b', 'l', 'xl')]
# Every variant at the published size in bfloat16, and the smallest in float16. CPUs are slow in that: there the others,
# up to B, take a training step on small images. Last: how many images, and the factor on hidden maps of feed-forwards.
CASES = [(*variant, torch.bfloat16, 224, 1, 16) for variant in VARIANTS]
CASES += [
    (make, arch, torch.float16, *((224, 1, 16) if arch == 'xt' else (64, 2 if make is OverLoCK else 1, 8)))
    for make, arch in VARIANTS
    if arch not in ('l', 'xl')
]


def build(make, arch, images, factor):
    """A network with weights as large as trained ones, but for its hidden maps, and the statistics of its images."""
    model = make(arch)
    randomise(model)
    norms = []
    for name, module in model.named_modules():
        if name.endswith('fc1') and isinstance(module, nn.Conv2d):
            module.weight.data.mul_(factor)
        if isinstance(module, nn.BatchNorm2d):
            norms.append(module)
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return model


def watch_squares(model):
    """Return a dict to be filled with the largest sum of the squares of a channel that each type of layer meets."""
    sums = {}

    def note(module, inputs):
        largest = inputs[0].detach().double().square().sum((2, 3)).max().item()
        sums[type(module)] = max(sums.get(type(module), 0), largest)

    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, GRN)):
            module.register_forward_pre_hook(note)
    return sums


@pytest.mark.slow
@pytest.mark.parametrize(('make', 'arch', 'dtype', 'size', 'batch', 'factor'), CASES)
def test_forward_and_training_are_finite(make, arch, dtype, size, batch, factor):
    images = 64 * torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = build(make, arch, images, factor)
    sums = watch_squares(model)
    with torch.autocast('cpu', dtype):
        logits = model(images)
        logits = logits if isinstance(logits, dict) else {'main': logits}
        loss = sum(value.float().logsumexp(1).mean() for value in logits.values())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert loss.isfinite() and all(gradient is not None for gradient in gradients.values())
    assert not non_finite(gradients) and not non_finite(model.state_dict())
    # In float16 these sums would be infinite.
    largest = torch.finfo(torch.float16).max
    assert sums[nn.BatchNorm2d] > largest
    if size < 224:
        return
    assert sums.get(GRN, 0) > largest or (make, arch) != (OverLoCK, 'xt')
    model.eval()
    with torch.no_grad():
        with torch.autocast('cpu', dtype):
            assert model(images).isfinite().all()
        # Without autocast, all of it in half precision.
        if dtype == torch.bfloat16:
            assert model.to(dtype)(images.to(dtype)).isfinite().all()
