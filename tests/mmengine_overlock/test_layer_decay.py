"""Learning rates that fall with depth."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmengine_overlock import layer_decay  # noqa: F401  (registers)
from overlock import OverLoCKBackbone
from overlock.models.moganet import MogaNetBackbone
from overlock.utils.errors import UserError
from tests.testing import TINY

# The factors of the published rule at 0.8, rounded, by parts of MogaNet's names.
FACTORS = {
    'patch_embed1.': 0.0550,
    'blocks1.': 0.0859,
    'patch_embed2.': 0.1074,
    'blocks2.': 0.1074,
    'blocks3.0.': 0.1074,
    'blocks3.1.': 0.1074,
    'patch_embed3.': 0.1342,
    'blocks3.2.': 0.1342,
    'blocks3.5.': 0.1678,
    'blocks3.6.': 0.2097,
    'blocks3.9.': 0.2621,
    'blocks3.11.': 0.3277,
    'blocks3.12.': 0.4096,
    'blocks3.15.': 0.5120,
    'blocks3.16.': 0.6400,
    'blocks3.21.': 0.6400,
    'patch_embed4.': 0.8,
    'blocks4.': 0.8,
    'norm1.': 1.0,
    'norm4.': 1.0,
}


def settings(backbone: nn.Module, rate: float = 0.8, **more) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay by the name of the parameter in a model with a head."""
    model = nn.ModuleDict({'backbone': backbone, 'neck': nn.Conv2d(8, 8, 3)})
    wrapper = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        paramwise_cfg=dict(decay_rate=rate, **more),
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optim_wrapper(model, wrapper).optimizer.param_groups
    found = [(names[id(p)], (group['lr'], group['weight_decay'])) for group in groups for p in group['params']]
    assert len(found) == len(dict(found))
    return dict(found)


def test_moganet_has_the_published_rates_and_no_decay_of_vectors():
    with torch.device('meta'):
        backbone = MogaNetBackbone('b')
    found = settings(backbone)
    assert len(found) == len(list(backbone.parameters())) + 2
    for name, (lr, decay) in found.items():
        part = name.removeprefix('backbone.')
        factor = next((factor for start, factor in FACTORS.items() if part.startswith(start)), None)
        if name.startswith('neck.'):
            assert lr == 1e-4
        elif factor is not None:
            assert lr == pytest.approx(factor * 1e-4, abs=5e-9), name
        vector = part.endswith('bias') or any(
            kind in part for kind in ('norm', 'scale', 'projection.1', 'projection.4')
        )
        assert decay == (0.0 if vector or part.endswith('mlp.decompose.weight') else 0.05), name


def test_overlock_loses_the_factor_with_every_block():
    found = settings(OverLoCKBackbone(TINY), 0.5)
    # From the stem on; TINY has a block in each stage, and two in Focus-Net's first.
    depths = [
        ('base_net.stem.',),
        ('base_net.stage1.0.',),
        ('base_net.downsample2.', 'base_net.stage2.0.'),
        ('base_net.downsample3.', 'base_net.stage3.0.'),
        ('overview_net.',),
        ('focus_net.context_proj.', 'focus_net.stage3.0.'),
        ('focus_net.stage3.1.',),
        ('focus_net.downsample.', 'focus_net.context_downsample.', 'focus_net.stage4.0.'),
        ('output_norms.', 'overview_'),
    ]
    for name, (lr, _) in found.items():
        depth = next((i for i, parts in enumerate(depths) if name.removeprefix('backbone.').startswith(parts)), 8)
        assert lr == pytest.approx(1e-4 * 0.5 ** (8 - depth)), name
    assert found['backbone.base_net.stage3.0.ls.weight'][1] == 0.0


def test_frozen_parameters_are_left_out():
    found = settings(MogaNetBackbone(dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1)), frozen_stages=1))
    assert not any(name.startswith(('backbone.patch_embed1.', 'backbone.blocks1.')) for name in found)


@pytest.mark.parametrize(('rate', 'more'), [(0.0, {}), (1.5, {}), ('0.8', {}), (0.8, {'num_layers': 12})], ids=str)
def test_wrong_settings_are_one_sentence(rate, more):
    with pytest.raises(UserError, match='takes decay_rate, above 0 and at most 1, and nothing else; got'):
        settings(OverLoCKBackbone(TINY), rate, **more)


def test_optimizer_without_a_learning_rate_is_refused():
    wrapper = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW'),
        paramwise_cfg=dict(decay_rate=0.8),
    )
    with pytest.raises(UserError, match='needs the learning rate; give the optimizer an lr'):
        build_optim_wrapper(OverLoCKBackbone(TINY), wrapper)


def test_model_without_such_a_backbone_is_refused():
    with pytest.raises(
        UserError, match='needs a backbone that numbers its depths, OverLoCK or MogaNet, and ModuleDict'
    ):
        settings(nn.Conv2d(3, 8, 3))


def test_outputs_that_are_left_out_do_not_lower_the_rates():
    for indices in ((0, 1), (0, 1, 2)):
        ids = OverLoCKBackbone(TINY, out_indices=indices).layer_ids()
        assert sorted(set(ids.values())) == list(range(max(ids.values()) + 1)), indices


def test_a_mark_of_replaced_settings_that_mmengine_leaves_is_no_mistake():
    assert settings(OverLoCKBackbone(TINY), 0.5, _delete_=True) == settings(OverLoCKBackbone(TINY), 0.5)
