"""MogaNet with timm's interface."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters

import overlock.timm
from overlock.checkpoint import WEIGHTS, CheckpointError
from overlock.models.moganet import MOGANET_ARCHS, MogaNet
from overlock.utils.errors import UserError
from tests.testing import MOGANET_TINY, assert_same, image, randomise, same

NAMES = [f'moganet_{arch}' for arch in MOGANET_ARCHS]


def create(**kwargs) -> torch.nn.Module:
    return randomise(timm.create_model('moganet_xt', arch=MOGANET_TINY, **kwargs))


def test_models_are_registered_with_the_published_preprocessing():
    assert timm.list_models('moganet_*', module='timm') == sorted(NAMES)
    tags = {f'{name}.in1k' for name in NAMES} | {'moganet_xt.in1k_256', 'moganet_t.in1k_256'}
    assert set(timm.list_models('moganet_*', module='timm', pretrained=True)) == tags
    for tag in tags:
        cfg, size = timm.get_pretrained_cfg(tag), 256 if tag.endswith('256') else 224
        name = tag.partition('.')[0] + '_256' * (size == 256) + '_in1k'
        assert (cfg.url, cfg.input_size, cfg.crop_pct, cfg.interpolation) == (
            WEIGHTS[name].url,
            (3, size, size),
            0.9,
            'bicubic',
        )
        assert cfg.pool_size == (size // 32, size // 32)
    assert set(NAMES) <= set(dir(overlock.timm))


@pytest.mark.parametrize('name', NAMES)
def test_model_is_the_classifier(name):
    model, x = timm.create_model(name, device='meta').eval(), torch.empty(1, 3, 64, 96, device='meta')
    with torch.device('meta'):
        ours = MogaNet(name.removeprefix('moganet_'))
    assert list(model.state_dict()) == list(ours.state_dict())
    for entry in (model.default_cfg['first_conv'], model.default_cfg['classifier']):
        assert f'{entry}.weight' in model.state_dict()
    assert model(x).shape == (1, 1000)
    assert model.forward_features(x).shape == (1, model.num_features, 2, 3)


def test_heads_change_as_timm_expects():
    model, x = create(num_classes=7).eval(), image(2, 64, 96).float()
    assert model(x).shape == (2, 7)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size) == (2, 32)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(0, '')
    assert model(x).shape == (2, 32, 2, 3)
    assert create(num_classes=5, global_pool='catavgmax').eval()(x).shape == (2, 5)
    assert timm.create_model('moganet_xt', arch=MOGANET_TINY, in_chans=1)(x[:, :1]).shape == (2, 1000)


@pytest.mark.parametrize(
    ('pool', 'error', 'message'),
    [
        ('', UserError, "takes pooled features: .*, got '' with 5 classes; give num_classes=0"),
        ('none', AssertionError, 'Invalid pool type'),
    ],
)
def test_pooling_that_does_not_fit_the_classifier_is_refused_and_changes_nothing(pool, error, message):
    model, x = create(num_classes=7).eval(), image(1, 64, 64).float()
    expected = model(x)
    with pytest.raises(error, match=message):
        model.reset_classifier(5, pool)
    assert (model.num_classes, model.global_pool) == (7, 'avg') and torch.equal(model(x), expected)


@pytest.mark.parametrize('indices', [(0, 1, 2, 3), (1, 2)], ids=str)
def test_features_are_the_normed_maps(indices):
    whole, x = create().eval(), image(2, 64, 96).float()
    model = timm.create_model('moganet_xt', arch=MOGANET_TINY, features_only=True, out_indices=indices).eval()
    model.model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.model.state_dict()})
    assert hasattr(model.model, 'blocks4') == (3 in indices)
    assert model.feature_info.channels() == [MOGANET_TINY['embed_dims'][i] for i in indices]
    with torch.no_grad():
        for out, i in zip(model(x), indices, strict=True):
            assert torch.equal(out, whole.forward_intermediates(x, [i], intermediates_only=True)[0])


def test_groups_have_a_block_each_and_hold_every_parameter():
    model = create()
    for coarse, count in ((False, 1 + sum(MOGANET_TINY['depths']) + 1), (True, 1 + 4 + 1)):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert len(groups) == count
        assert sorted(name for names in groups.values() for name in names) == sorted(
            name for name, _ in model.named_parameters()
        )


def test_published_weights_load_by_name_for_other_classes_and_channels(tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path))
    state = randomise(MogaNet('xt')).state_dict()
    for name in ('moganet_xt_in1k', 'moganet_xt_256_in1k'):
        torch.save({'state_dict': state, 'author': 'them'}, tmp_path / Path(WEIGHTS[name].url).name)
    assert same(timm.create_model('moganet_xt', pretrained=True).state_dict(), state)
    assert same(timm.create_model('moganet_xt.in1k_256', pretrained=True).state_dict(), state)
    other = timm.create_model('moganet_xt', pretrained=True, num_classes=5, in_chans=1)
    assert other.head.weight.shape == (5, 192)
    stem = 'patch_embed1.projection.0.weight'
    torch.testing.assert_close(other.state_dict()[stem], state[stem].sum(1, keepdim=True))
    assert torch.equal(other.blocks4[1].layer_scale_1, state['blocks4.1.layer_scale_1'])
    with pytest.raises(CheckpointError, match='is not for this model: .* give the file of the same variant'):
        timm.create_model(
            'moganet_t',
            pretrained=True,
            checkpoint_path='',
            pretrained_cfg_overlay={'file': str(tmp_path / Path(WEIGHTS['moganet_xt_in1k'].url).name)},
        )


def test_folded_model_loads_published_weights():
    model = create(num_classes=3).eval()
    folded = timm.create_model('moganet_xt', arch=MOGANET_TINY, num_classes=3, deploy=True).eval()
    folded.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert_same(folded, model, image(1, 64, 64).float())
