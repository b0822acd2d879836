"""Folding changes no output and leaves nothing linear to do; the folded form is the one that `deploy` builds."""

import copy

import pytest
import torch
from torch import nn

from overlock import OverLoCK, OverLoCKBackbone
from overlock.checkpoint import CheckpointError
from overlock.layers import (
    ChannelAffine,
    ConvFFN,
    ConvNorm,
    DilatedReparamConv,
    DropPath,
    PointwiseConv,
    ResidualDWConv,
)
from overlock.layers.fold import fold_into_next, switch_children
from overlock.layers.large_kernel import BRANCHES
from overlock.models.blocks import DynamicBlock, StaticBlock
from tests.testing import FOLDED, MODELS, TINY, assert_relative, assert_same, image, published_weights, randomise


def signature(model):
    return {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}


@pytest.mark.parametrize('kernel_size', sorted(BRANCHES))
def test_every_large_kernel_merges_exactly(kernel_size):
    layer = randomise(DilatedReparamConv(4, kernel_size).double().eval())
    merged = copy.deepcopy(layer)
    merged.switch_to_deploy()
    assert_same(merged, layer, torch.randn(2, 4, 23, 19, dtype=torch.float64), 1e-12)
    assert list(merged.state_dict()) == ['conv.weight', 'conv.bias']


@pytest.mark.parametrize(
    'make',
    [
        lambda: ConvNorm(4, 6, 3, stride=2, act=nn.GELU()),
        lambda: ConvNorm(4, 4, 3, groups=4, bias=True),
        lambda: ConvFFN(4, 8),
        lambda: StaticBlock(4, 7),
        lambda: StaticBlock(4, 7, layer_scale=True),
    ],
    ids=['conv', 'depthwise conv with bias', 'ffn', 'static block', 'static block with layer scale'],
)
def test_every_layer_folds_by_itself_exactly_and_once(make):
    layer = randomise(make().double().eval())
    folded = copy.deepcopy(layer)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    for _ in range(2):
        folded.switch_to_deploy()
        assert_same(folded, layer, x, 1e-12)


@pytest.mark.parametrize('mix_prior', [True, False])
def test_dynamic_block_folds_by_itself_exactly_and_once(mix_prior):
    block = randomise(DynamicBlock(16, 4, 7, num_groups=2, mix_prior=mix_prior).double().eval())
    folded = copy.deepcopy(block)
    maps = [torch.randn(2, channels, 9, 7, dtype=torch.float64) for channels in (16, 4, 4)]
    with torch.no_grad():
        for _ in range(2):
            folded.switch_to_deploy()
            for ours, truth in zip(folded(*maps), block(*maps), strict=True):
                assert_relative(ours, truth, 1e-12)


@pytest.mark.parametrize('dtype', FOLDED, ids=str)
@pytest.mark.parametrize('kind', MODELS)
def test_folded_model_gives_the_same_outputs_at_any_size(kind, dtype):
    model = randomise(MODELS[kind]().to(dtype).eval())
    folded = copy.deepcopy(model)
    assert folded.switch_to_deploy() is folded
    for size in ((32, 32), (64, 96), (97, 71)):
        assert_same(folded, model, image(2, *size).to(dtype))


@pytest.mark.parametrize('kind', ['classifier', 'detection', 'segmentation'])
def test_published_size_folds_too(kind, shapes):
    model = MODELS[kind]('xt').eval()
    model.load_state_dict(published_weights(shapes[{'classifier': 'cls', 'detection': 'det'}.get(kind, 'seg')]['xt']))
    assert_same(copy.deepcopy(model).switch_to_deploy(), model, image(1, 97, 71).float())


@pytest.mark.parametrize('kind', MODELS)
def test_folding_again_or_a_copy_changes_nothing(kind):
    folded = randomise(MODELS[kind]()).switch_to_deploy()
    again = copy.deepcopy(folded).switch_to_deploy()
    assert signature(again) == signature(folded)
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in again.state_dict().items())
    assert_same(again.eval(), folded.eval(), image(1, 64, 64).float())


@pytest.mark.parametrize('kind', MODELS)
def test_merged_model_folds_further(kind):
    model = randomise(MODELS[kind]().double().eval())
    merged = copy.deepcopy(model).to_form('merged')
    assert (model.form, merged.form) == ('training', 'merged')
    assert signature(merged) == signature(merged.twin('merged').double())
    assert_same(merged.to_form('folded'), model, image(1, 64, 64))
    assert merged.form == 'folded'
    with pytest.raises(CheckpointError, match='the network has the folded form, out of which no merged form can be'):
        merged.to_form('merged')


@pytest.mark.parametrize('kind', MODELS)
def test_nothing_linear_is_left(kind):
    folded = MODELS[kind]().switch_to_deploy()
    for name, module in folded.named_modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm), name
        assert not isinstance(module, ResidualDWConv) or not module.shortcut, name
        assert not isinstance(module, ChannelAffine) or module.bias is None or name.endswith('prior_scale'), name
    names = list(folded.state_dict())
    assert not any(
        'branches' in name or 'ffn.grn.beta' in name or '.norm2.' in name or name.startswith('output_norms.overview')
        for name in names
    )
    kinds = {type(module.conv) for module in folded.modules() if isinstance(module, ConvNorm)}
    assert kinds <= {nn.Conv2d, PointwiseConv}


@pytest.mark.parametrize('kind', MODELS)
def test_deploy_builds_what_switching_gives(kind):
    switched, built = MODELS[kind]().switch_to_deploy(), MODELS[kind](deploy=True)
    assert signature(switched) == signature(built)
    assert str(switched) == str(built)
    built.load_state_dict(randomise(switched).state_dict(), strict=True)
    assert_same(built.eval(), switched.eval(), image(1, 64, 64).float(), 1e-12)


def test_model_in_training_folds_running_statistics_and_moves_none_after():
    model = randomise(OverLoCKBackbone(TINY).double()).eval()
    folded = copy.deepcopy(model).train().switch_to_deploy()
    assert all(module.training for module in folded.modules())
    before = copy.deepcopy(folded.state_dict())
    x = image(2, 64, 64)
    assert_same(folded, model, x)
    sum(out.square().mean() for out in folded(x)).backward()
    assert all(p.grad is not None for p in folded.parameters())
    assert all(torch.equal(value, before[name]) for name, value in folded.state_dict().items())
    assert folded.eval().train() is folded
    assert_same(folded, model, x)


def test_folded_model_in_training_still_drops_paths():
    folded = randomise(OverLoCKBackbone(TINY, drop_path_rate=0.5, deploy=True)).train()
    assert sum(isinstance(module, DropPath) and module.rate > 0 for module in folded.modules()) == 6
    torch.manual_seed(0)
    x = image(1, 64, 64).float().expand(8, -1, -1, -1)
    with torch.no_grad():
        last = folded(x)[3]
        assert not torch.equal(last[:1].expand_as(last), last)
        still = folded.eval()(x)[3]
        assert_relative(still[:1].expand_as(still), still, 1e-6)


def test_folded_classifier_in_training_gives_both_logits():
    model = randomise(OverLoCK(TINY, num_classes=5).double()).eval()
    folded = copy.deepcopy(model).switch_to_deploy().train()
    x = image(2, 64, 64)
    with torch.no_grad():
        logits = folded(x)
        assert_relative(logits['main'], model(x), 1e-10)
        assert_relative(logits['aux'], model.aux_head(model.encode(x)[1]).flatten(1), 1e-10)


@pytest.mark.parametrize('switch', [True, False])
def test_frozen_stages_stay_frozen(switch):
    if switch:
        model = OverLoCKBackbone(TINY, frozen_stages=2).switch_to_deploy()
    else:
        model = OverLoCKBackbone(TINY, frozen_stages=2, deploy=True)
    frozen = tuple(f'base_net.{part}.' for part in ('stem', 'stage1', 'downsample2', 'stage2'))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen)), name


def test_every_trunk_below_a_module_folds():
    detector = nn.ModuleDict({'backbone': OverLoCKBackbone(TINY), 'neck': nn.Sequential(nn.Conv2d(1, 1, 1))})
    switch_children(detector)
    assert signature(detector['backbone']) == signature(OverLoCKBackbone(TINY, deploy=True))


def test_synchronised_batch_norms_fold():
    model = randomise(OverLoCKBackbone(TINY)).eval()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert_same(synchronised.switch_to_deploy(), model, image(1, 64, 64).float())


def test_bfloat16_autocast_runs_folded():
    model = randomise(OverLoCKBackbone(TINY)).eval()
    folded = copy.deepcopy(model).switch_to_deploy()
    x = image(1, 64, 96).float()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        outs = folded(x)
    with torch.no_grad():
        for ours, truth in zip(outs, model(x), strict=True):
            assert_relative(ours, truth, 5e-2)


def test_folding_keeps_the_dtype_and_computes_in_float64():
    model = randomise(ConvNorm(8, 8, 3).to(torch.bfloat16)).eval()
    weight, bn = model.conv.weight.detach().double(), copy.deepcopy(model.bn).double()
    model.switch_to_deploy()
    expected = weight * (bn.weight / (bn.running_var + bn.eps).sqrt()).detach().view(-1, 1, 1, 1)
    assert torch.equal(model.conv.weight, expected.to(torch.bfloat16))


def test_shift_does_not_fold_into_a_padded_convolution():
    with pytest.raises(ValueError, match='dense 1x1 convolution without padding alone, got Conv2d'):
        fold_into_next(torch.ones(2), torch.ones(2), nn.Conv2d(2, 2, 3, padding=1))


def test_kernel_without_branches_is_refused():
    with pytest.raises(ValueError, match='kernel_size must be one of'):
        DilatedReparamConv(4, 6)
