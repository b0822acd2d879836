"""MogaNet gives the published network's numbers, under the published names."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from overlock.models.moganet import MOGANET_ARCHS, MogaNet, MogaNetBackbone
from tests.testing import DATA, assert_relative, image, published_weights

DOUBLE = 1e-10


@pytest.fixture(scope='module')
def shapes() -> dict[str, dict[str, list[int]]]:
    """Published shapes of the classifiers by variant and name."""
    return json.loads(gzip.decompress((DATA / 'state_dicts_moganet.json.gz').read_bytes()))


@pytest.fixture(scope='module')
def golden() -> dict[str, np.ndarray]:
    with np.load(DATA / 'golden_moganet.npz') as file:
        return dict(file)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def dense(shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    return {name: shape for name, shape in shapes.items() if not name.startswith('head.')}


def build(model: torch.nn.Module, shapes: dict[str, list[int]]) -> torch.nn.Module:
    model.double().load_state_dict(published_weights(shapes), strict=True)
    return model.eval()


def assert_output(out: torch.Tensor, golden: dict[str, np.ndarray], key: str, count: int = 2048) -> None:
    assert list(out.shape) == golden[f'{key}/shape'].tolist()
    flat = out.detach().flatten()
    assert_relative(flat[:: max(1, flat.numel() // count)], golden[f'{key}/sample'], DOUBLE)


@pytest.mark.parametrize('arch', MOGANET_ARCHS)
def test_names_and_shapes_are_the_published_ones_in_their_order(arch, shapes):
    with torch.device('meta'):
        models = MogaNet(arch), MogaNetBackbone(arch)
    for model, expected in zip(models, (shapes[arch], dense(shapes[arch])), strict=True):
        assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected
        parameters = [name for name, _ in model.named_parameters()]
        assert parameters == [name for name in expected if name in set(parameters)]


@pytest.mark.parametrize(
    ('arch', 'height', 'width'), [('xt', 224, 224), slow('t', 224, 224), slow('s', 160, 224), slow('b', 96, 128)]
)
def test_logits_are_those_of_the_published_classifier(arch, height, width, shapes, golden):
    with torch.no_grad():
        logits = build(MogaNet(arch), shapes[arch])(image(1, height, width))
    assert_output(logits, golden, f'cls/{arch}/{height}x{width}/0')


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize(
    ('arch', 'height', 'width'), [('xt', 224, 224), slow('xt', 250, 333), slow('s', 193, 257), slow('b', 64, 96)]
)
def test_outputs_are_those_of_the_published_backbone(arch, height, width, deploy, shapes, golden):
    model = build(MogaNetBackbone(arch), dense(shapes[arch]))
    with torch.no_grad():
        outs = (model.switch_to_deploy() if deploy else model)(image(1, height, width))
    for i, out in enumerate(outs):
        assert_output(out, golden, f'dense/{arch}/{height}x{width}/{i}')


def test_inner_activations_are_those_of_the_published_backbone(shapes, golden):
    prefix = 'dense/xt/224x224/inner/'
    names = {key.removeprefix(prefix).rpartition('/')[0] for key in golden if key.startswith(prefix)}
    model, seen = build(MogaNetBackbone('xt'), dense(shapes['xt'])), {}

    def record(name):
        def hook(module, args, out):
            # The published module adds the shortcut that our block adds.
            seen[name] = args[0] + out if name.endswith('attn') else out

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(record(name))
    with torch.no_grad():
        model(image(1, 224, 224))
    assert names == set(seen)
    for name in names:
        assert_output(seen[name], golden, f'{prefix}{name}', count=1024)


@pytest.mark.parametrize('with_cp', [False, True])
def test_training_loss_and_every_gradient_norm_are_those_of_the_published_backbone(with_cp, shapes, golden):
    model = build(MogaNetBackbone('xt', with_cp=with_cp), dense(shapes['xt'])).train()
    loss = sum(out.square().mean() for out in model(image(2, 96, 96)))
    loss.backward()
    assert_relative(loss.detach(), golden['dense/xt/train_2x96x96/loss'], DOUBLE)
    expected = golden['dense/xt/train_2x96x96/grad_norm']
    actual = np.array([parameter.grad.norm().item() for parameter in model.parameters()])
    # A bias before a BatchNorm has no gradient but rounding, so each norm is held to the scale of the largest too.
    np.testing.assert_allclose(actual, expected, rtol=DOUBLE, atol=DOUBLE * 1e-3 * expected.max())


@pytest.mark.skipif(not os.environ.get('OVERLOCK_REFERENCE'), reason='OVERLOCK_REFERENCE names no folder')
def test_golden_values_are_the_reference_as_it_stands(golden, shapes):
    folder = Path(os.environ['OVERLOCK_REFERENCE'])
    with np.load(folder / 'golden_moganet.npz') as reference:
        assert set(reference.files) == set(golden)
        for key in golden:
            np.testing.assert_array_equal(golden[key], reference[key])
    assert json.loads((folder / 'state_dict_moganet.json').read_text()) == shapes
    assert json.loads((folder / 'grad_norm_names_moganet.json').read_text()) == [
        name for name, _ in MogaNetBackbone('xt').named_parameters()
    ]
