"""Compiled blocks compute the same, and backbones in bfloat16 nearly the same."""

import copy

import pytest
import torch
from torch import nn

from mmengine_overlock.speed import compile_backbones, narrow_backbones
from overlock import MogaNetBackbone, OverLoCKBackbone
from overlock.utils.errors import UserError

TINY = dict(
    embed_dims=(8, 16, 32, 48), base_depths=(1, 1, 2), overview_depth=1, focus_depths=(3, 1), focus_groups=(2, 2)
)


# oneDNN has no fast bfloat16 kernels for depthwise convolutions of few channels: with 8 one takes minutes.
WIDER = {**TINY, 'embed_dims': (64, 64, 64, 64)}
WIDE_MOGANET = dict(embed_dims=(64, 64, 64, 64), depths=(1, 1, 1, 1), ffn_ratios=(2, 2, 2, 2))


class Detector(nn.Module):
    """A model with a backbone."""

    def __init__(self, backbone=None) -> None:
        super().__init__()
        self.backbone = backbone or OverLoCKBackbone(TINY, drop_path_rate=0.3)

    def forward(self, x):
        return self.backbone(x)


def image(height=256, width=224, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize('network', [OverLoCKBackbone, MogaNetBackbone])
def test_backbone_in_bfloat16_gives_float32_near_the_exact_maps(network):
    torch.manual_seed(0)
    model = Detector(network(WIDER if network is OverLoCKBackbone else WIDE_MOGANET)).eval()
    with torch.no_grad():
        expected = model(image(64, 96))
        narrow_backbones(model)
        actual = model(image(64, 96))
    for ours, truth in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        deviation = (ours - truth).abs().max() / truth.abs().max()
        assert 0 < deviation < 5e-2


def test_narrow_backbone_can_be_copied_and_the_copy_uses_its_own_weights():
    model = Detector(OverLoCKBackbone(WIDER)).eval()
    narrow_backbones(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert other(image(64, 64))[0].abs().max() == 0 < model(image(64, 64))[0].abs().max()


@pytest.mark.parametrize('function', [narrow_backbones, compile_backbones])
def test_model_without_the_backbone_is_refused(function):
    with pytest.raises(UserError, match='work on the backbones OverLoCK and MogaNet, and this model has none'):
        function(nn.Linear(1, 1))


@pytest.mark.slow
def test_compiled_blocks_train_the_same_in_few_graphs_for_every_size():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = Detector().train()
    names = list(model.state_dict())
    compiled = copy.deepcopy(model)
    compile_backbones(compiled, backend='aot_eager', fullgraph=True)
    for size in ((256, 224), (288, 352)):
        results = []
        for each in (model, compiled):
            torch.manual_seed(1)
            outs = each(image(*size))
            each.zero_grad()
            sum(out.square().mean() for out in outs).backward()
            results.append([*outs, *(parameter.grad for parameter in each.parameters())])
        largest = max(t.abs().max() for t in results[0])
        for ours, truth in zip(*results, strict=True):
            assert (ours - truth).abs().max() <= 1e-5 * largest
    assert list(compiled.state_dict()) == names
    # Four static stages; dynamic blocks without a prior, with one, and the last: not one for each block and size.
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 7


@pytest.mark.slow
def test_compiled_blocks_of_moganet_compute_the_same():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Detector(MogaNetBackbone(WIDE_MOGANET)).train()
    compiled = copy.deepcopy(model)
    compile_backbones(compiled, backend='aot_eager', fullgraph=True)
    for ours, truth in zip(compiled(image(64, 96)), model(image(64, 96)), strict=True):
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()
