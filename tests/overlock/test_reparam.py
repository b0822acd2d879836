"""Merging changes no output, and the merged form is the published one."""

import copy

import pytest
import torch

from overlock import OverLoCK, OverLoCKBackbone
from overlock.layers import DilatedReparamConv
from overlock.layers.dilated import BRANCHES
from overlock.reparam import pad_kernel
from tests.overlock.conftest import TOLERANCES, assert_relative, image, published_weights, randomise_statistics


@pytest.mark.parametrize('kernel_size', sorted(BRANCHES))
def test_every_large_kernel_merges_exactly(kernel_size):
    layer = DilatedReparamConv(4, kernel_size).double().eval()
    randomise_statistics(layer)
    x = torch.randn(2, 4, 23, 19, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)
        layer.switch_to_deploy()
        assert_relative(layer(x), expected, 1e-12)


@pytest.mark.parametrize('model_class', [OverLoCK, OverLoCKBackbone])
def test_merged_model_gives_the_same_outputs_and_merging_again_changes_nothing(model_class):
    torch.manual_seed(0)
    model = model_class('xt').eval()
    randomise_statistics(model)
    x = image(1, 64, 96).float()
    with torch.no_grad():
        expected = model(x)
        assert model.switch_to_deploy() is model
        names = list(model.state_dict())
        actual = model(x)
        model.switch_to_deploy()
    for ours, truth in zip(actual, expected, strict=True):
        assert_relative(ours, truth, TOLERANCES[torch.float32])
    assert list(model.state_dict()) == names
    assert not any('branches' in name for name in names)


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
def test_deploy_form_loads_published_reparameterised_names_strictly(arch, shapes):
    model = OverLoCK(arch, deploy=True)
    result = model.load_state_dict(published_weights(shapes['cls_reparam'][arch]), strict=True)
    assert not result.missing_keys and not result.unexpected_keys


def test_switched_model_and_deploy_form_have_the_same_names_and_outputs():
    model = OverLoCKBackbone('xt').double().eval()
    randomise_statistics(model)
    merged = copy.deepcopy(model).switch_to_deploy()
    built = OverLoCKBackbone('xt', deploy=True).double().eval()
    built.load_state_dict(merged.state_dict(), strict=True)
    with torch.no_grad():
        for ours, truth in zip(built(image(1, 64, 64)), model(image(1, 64, 64)), strict=True):
            assert_relative(ours, truth, TOLERANCES[torch.float64])


def test_dilated_kernel_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match='spans 9 pixels and does not fit'):
        pad_kernel(torch.ones(1, 1, 5, 5), 2, 7)
    with pytest.raises(ValueError, match='kernel_size must be one of'):
        DilatedReparamConv(4, 6)
