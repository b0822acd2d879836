"""What users rely on in MogaNet's classifier and backbone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from overlock.layers import DropPath
from overlock.layers.fold import BatchNorm
from overlock.models.moganet import MOGANET_ARCHS, MogaArch, MogaNet, MogaNetBackbone
from tests.testing import MOGANET_TINY as TINY
from tests.testing import TOLERANCES, assert_relative, assert_same, image, randomise, same

# Parameters, counted on the published networks: classifier and backbone.
PARAMETERS = {
    'xt': (2_956_066, 2_763_066),
    't': (5_197_332, 4_940_332),
    's': (25_335_675, 24_822_675),
    'b': (43_720_475, 43_207_475),
    'l': (82_480_978, 81_839_978),
    'xl': (180_991_924, 180_030_924),
}


def norms(model: nn.Module) -> dict[str, BatchNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}


def square_loss(outs) -> torch.Tensor:
    return sum(out.square().mean() for out in outs)


@pytest.mark.parametrize('arch', MOGANET_ARCHS)
def test_parameter_counts_are_those_of_the_published_models(arch):
    with torch.device('meta'):
        models = MogaNet(arch), MogaNetBackbone(arch)
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == PARAMETERS[arch]


@pytest.mark.parametrize(('height', 'width'), [(32, 32), (33, 47), (64, 200)])
def test_backbone_takes_any_size_from_32(height, width):
    model = MogaNetBackbone(TINY).eval()
    with torch.no_grad():
        outs = model(image(1, height, width).float())
    assert model.out_channels == TINY['embed_dims']
    for i, out in enumerate(outs):
        stride = 4 * 2**i
        assert out.shape == (1, model.out_channels[i], -(-height // stride), -(-width // stride))
        assert out.isfinite().all() and out.is_contiguous()


def test_classifier_has_logits_features_and_maps():
    model, x = MogaNet(TINY, in_channels=4, num_classes=5).eval(), torch.rand(2, 4, 64, 32)
    with torch.no_grad():
        maps = model.forward_features(x)
        assert maps.shape == (2, 32, 2, 1)
        assert model.forward_head(maps, pre_logits=True).shape == (2, 32)
        assert torch.equal(model(x), model.forward_head(maps)) and model(x).shape == (2, 5)


@pytest.mark.parametrize('model_class', [MogaNet, MogaNetBackbone])
def test_image_that_does_not_fit_is_refused_in_one_sentence(model_class):
    with pytest.raises(ValueError, match='at least 32x32 pixels, got 31x64'):
        model_class(TINY)(torch.zeros(1, 3, 31, 64))
    with pytest.raises(ValueError, match=r'\(B, C, H, W\), got \(3, 64, 64\)'):
        model_class(TINY)(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match='must have 3 channels, got 4; build the network with in_channels=4'):
        model_class(TINY)(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize(
    ('arch', 'message'),
    [
        ('tiny', 'one of xt, t, s, b, l, xl'),
        ({'embed_dims': (8, 8, 8, 8)}, "missing 1 required .* 'depths'; its fields are embed_dims, depths, ffn_ratios"),
        ({**TINY, 'width': 3}, "unexpected keyword argument 'width'; its fields are embed_dims, depths, ffn_ratios"),
        ({**TINY, 'depths': (1, 1, 1)}, 'depths must have 4 entries'),
        ({**TINY, 'ffn_ratios': (2, 2, 2, 0)}, 'ffn_ratios must hold positive integers'),
        ({**TINY, 'embed_dims': (8, 12, 16, 32)}, 'divisible by 8'),
    ],
)
def test_wrong_arch_is_one_sentence(arch, message):
    with pytest.raises(ValueError, match=message):
        MogaNet(arch)


def test_arch_is_a_name_a_dict_or_an_arch():
    arch = MogaArch(**TINY)
    assert MogaNet(TINY).arch == arch and MogaNet(arch).arch is arch and MogaNet('xt').arch is MOGANET_ARCHS['xt']
    with pytest.raises(TypeError, match='must be a name, a dict or an overlock.MogaArch, got int'):
        MogaNet(3)


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (0,), (2,), (3,), (0, 2)], ids=str)
def test_outputs_are_those_asked_for_and_every_parameter_gets_a_gradient(out_indices):
    model, whole = MogaNetBackbone(TINY, out_indices=out_indices).train(), MogaNetBackbone(TINY).train()
    assert not whole.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    x = image(2, 64, 64).float()
    outs = model(x)
    assert [out.shape[1] for out in outs] == list(model.out_channels) == [TINY['embed_dims'][i] for i in out_indices]
    with torch.no_grad():
        for i, out in zip(out_indices, outs, strict=True):
            assert_relative(out.detach(), whole(x)[i], TOLERANCES[torch.float32])
    square_loss(outs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('out_indices', [2, range(2), {0, 1}, np.array([0, 3]), (0.0, 1.0), (True,)], ids=repr)
def test_out_indices_are_kept_as_integers(out_indices):
    model = MogaNetBackbone(TINY, out_indices=out_indices)
    assert all(type(i) is int for i in model.out_indices)
    assert len(model(torch.zeros(2, 3, 64, 64))) == len(model.out_indices) == len(model.out_channels)


@pytest.mark.parametrize('out_indices', [(), (1, 0), (1, 1), (0, 4), (-1,), None, '01', (0, '1'), (1.5,)], ids=repr)
def test_wrong_out_indices_are_refused(out_indices):
    with pytest.raises(ValueError, match='ascending and among 0 to 3'):
        MogaNetBackbone(TINY, out_indices=out_indices)


def test_checkpointing_changes_no_value_and_keeps_fewer_activations():
    models = MogaNetBackbone(TINY).train(), MogaNetBackbone(TINY, with_cp=True).train()
    models[1].load_state_dict(randomise(models[0]).state_dict())
    x, kept = image(2, 64, 64).float(), []
    for model in models:
        counts = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, counts=counts: counts.append(t.numel()) or t, id):
            model(x)
        kept.append(sum(counts))
    assert kept[1] < 0.5 * kept[0]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        square_loss(model(x)).backward()
    for ours, truth in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, truth.grad)
    for ours, truth in zip(models[1].buffers(), models[0].buffers(), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 3, 4])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1,)], ids=str)
def test_frozen_stages_are_frozen_and_stay_in_evaluation(frozen_stages, out_indices):
    model = MogaNetBackbone(TINY, frozen_stages=frozen_stages, out_indices=out_indices)
    stages = [('patch_embed1.',), ('blocks1.', 'norm1.')]
    stages += [(f'patch_embed{i}.', f'blocks{i}.', f'norm{i}.') for i in (2, 3, 4)]
    frozen = tuple(prefix for stage in stages[: frozen_stages + 1] for prefix in stage)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        assert model.train() is model
        outs = model(image(2, 64, 64).float())
        if any(out.requires_grad for out in outs):
            square_loss(outs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (not name.startswith(frozen) if frozen else True), name
    for name, norm in norms(model).items():
        assert norm.training == (not f'{name}.'.startswith(frozen) if frozen else True), name
        assert torch.equal(norm.running_mean, before[f'{name}.running_mean']) != norm.training, name


def test_wrong_frozen_stages_are_refused():
    for stages in (5, -2, 1.5, '1', None):
        with pytest.raises(ValueError, match=f'frozen_stages must be between -1 and 4, got {stages}'):
            MogaNetBackbone(TINY, frozen_stages=stages)
    # As arithmetic in a configuration may give it.
    assert not MogaNetBackbone(TINY, frozen_stages=4 / 2).patch_embed2.projection.weight.requires_grad


def test_norm_eval_keeps_every_batch_norm_in_evaluation():
    model = MogaNetBackbone(TINY, norm_eval=True).train().train()
    assert norms(model) and not any(norm.training for norm in norms(model).values())
    assert model.blocks1[0].drop_path.training


def test_norm_settings_reach_every_batch_norm():
    plain = MogaNetBackbone(TINY)
    assert {(type(norm), norm.eps, norm.momentum) for norm in norms(plain).values()} == {(nn.BatchNorm2d, 1e-5, 0.1)}
    norm_cfg = dict(type='SyncBN', requires_grad=False, eps=1e-3, momentum=0.01)
    model = MogaNetBackbone(TINY, norm_cfg=norm_cfg)
    assert list(norms(model)) == list(norms(plain))
    assert {(type(norm), norm.eps, norm.momentum) for norm in norms(model).values()} == {(nn.SyncBatchNorm, 1e-3, 0.01)}
    inside = {f'{name}.{kind}' for name in norms(model) for kind in ('weight', 'bias')}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == inside
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    'norm_cfg',
    [
        dict(type='GN', num_groups=4),
        dict(type='LN2d'),
        dict(epsilon=1e-3),
        dict(eps='1e-3'),
        dict(eps=-1e-3),
        dict(momentum=2.0),
        dict(requires_grad=None),
        'BN',
    ],
    ids=str,
)
def test_norm_settings_that_do_not_fit_are_refused(norm_cfg):
    with pytest.raises(ValueError) as error:
        MogaNetBackbone(TINY, norm_cfg=norm_cfg)
    assert "type ('BN' or 'SyncBN', which published weights fit), " in str(error.value)
    assert str(error.value).endswith(f'; got {norm_cfg!r}')


def test_drop_path_rises_linearly_over_all_blocks_and_serves_both_branches():
    model = MogaNetBackbone('xt', drop_path_rate=0.17)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.01 * i for i in range(18)])
    short = MogaNetBackbone('xt', drop_path_rate=0.17, out_indices=(1,))
    assert [m.rate for m in short.modules() if isinstance(m, DropPath)] == pytest.approx(rates[:6])
    with pytest.raises(ValueError, match=r'drop_path_rate must be in \[0, 1\), got 1'):
        MogaNet(TINY, drop_path_rate=1)


def test_initial_weights_are_those_of_the_published_classifier():
    torch.manual_seed(0)
    model = MogaNet('t')
    block = model.blocks3[0]
    # sqrt(2 / fan_out), with the fan_out of one group: 25, and 1 for the convolution to one channel.
    assert block.attn.value.DW_conv0.weight.std().item() == pytest.approx(0.283, rel=0.05)
    assert block.mlp.decompose.weight.std().item() == pytest.approx(1.414, rel=0.2)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for scale in (block.layer_scale_1, block.layer_scale_2, block.attn.sigma.scale, block.mlp.sigma.scale):
        assert torch.equal(scale, torch.full_like(scale, 1e-5))
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith('bias'))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('out_indices', [None, (0, 1, 2, 3), (1,)], ids=str)
def test_folded_network_has_no_batch_norm_and_gives_the_same(out_indices, dtype):
    model = MogaNet(TINY) if out_indices is None else MogaNetBackbone(TINY, out_indices=out_indices)
    model = randomise(model.to(dtype)).eval()
    folded = copy.deepcopy(model).switch_to_deploy()
    assert not norms(folded)
    assert not any('layer_scale' in name for name, _ in folded.named_parameters())
    x = image(2, 64, 96).to(dtype)
    assert_same(folded, model, x)
    state = copy.deepcopy(folded.state_dict())
    assert folded.switch_to_deploy() is folded and same(folded.state_dict(), state)
    built = type(model)(TINY, deploy=True, **({} if out_indices is None else {'out_indices': out_indices})).to(dtype)
    built.load_state_dict(state, strict=True)
    assert_same(built.eval(), folded, x)


def test_folding_keeps_what_is_frozen():
    model = MogaNetBackbone(TINY, frozen_stages=1).switch_to_deploy()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(('patch_embed1.', 'blocks1.')), name


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_are_kept_and_near_float32(dtype):
    model = randomise(MogaNetBackbone(TINY)).eval()
    x = image(1, 64, 96).float()
    with torch.no_grad():
        for ours, truth in zip(copy.deepcopy(model).to(dtype)(x.to(dtype)), model(x), strict=True):
            assert ours.dtype == dtype
            assert_relative(ours, truth, max(TOLERANCES[dtype], TOLERANCES[torch.float32]))


def test_bfloat16_autocast_trains_and_keeps_the_small_layer_scales():
    model, x = MogaNetBackbone(TINY).train(), image(2, 64, 64).float()
    before = [out.detach() for out in model(x)]
    with torch.autocast('cpu', torch.bfloat16):
        outs = model(x)
        # Between blocks the map stays float32: bfloat16 would lose a branch that is scaled by 1e-5.
        assert all(out.dtype == torch.float32 for out in outs)
        loss = square_loss(outs)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for ours, truth in zip(outs, before, strict=True):
        assert_relative(ours.detach(), truth, TOLERANCES[torch.bfloat16])


def test_sync_batch_norm_conversion_reaches_every_batch_norm():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(MogaNetBackbone(TINY))
    assert {type(norm) for norm in norms(model).values()} == {nn.SyncBatchNorm}


@pytest.mark.parametrize('prefix', ['backbone.', 'module.encoder.'])
def test_published_names_load_strictly_at_any_prefix(prefix):
    state = {f'{prefix}{name}': value for name, value in randomise(MogaNetBackbone(TINY)).state_dict().items()}
    holder = model = MogaNetBackbone(TINY)
    for name in reversed(prefix.split('.')[:-1]):
        holder = nn.ModuleDict({name: holder})
    holder.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[f'{prefix}{name}']) for name, value in model.state_dict().items())


def test_folded_backbone_with_other_norm_settings_takes_a_training_state_dict():
    settings = dict(norm_cfg=dict(eps=1e-1))
    model = randomise(MogaNetBackbone(TINY, **settings)).eval()
    folded = MogaNetBackbone(TINY, deploy=True, **settings).eval()
    folded.load_state_dict(model.state_dict())
    x = image(1, 64, 64).float()
    with torch.no_grad():
        for ours, truth in zip(folded(x), model(x), strict=True):
            assert_relative(ours, truth, 1e-4)


def test_network_whose_blocks_were_folded_by_themselves_is_folded_whole():
    model = randomise(MogaNetBackbone(TINY)).eval()
    x = image(1, 64, 64).float()
    folded = copy.deepcopy(model)
    # As timm's reparameterize_model does.
    folded.blocks1[-1].switch_to_deploy()
    assert not norms(folded.switch_to_deploy())
    assert_same(folded, model, x)
    MogaNetBackbone(TINY, deploy=True).load_state_dict(folded.state_dict(), strict=True)
