"""The published pipeline, which speeds are compared with, computes what our network computes."""

import pytest
import torch

from benchmarks import published as pipeline
from benchmarks.presets import outputs, randomise
from benchmarks.published import aggregate_natten, aggregate_unfold, published
from benchmarks.rounds import deviation
from overlock import OverLoCK, OverLoCKBackbone
from overlock.ops import contmix, explain
from tests.testing import TINY

natten_missing = explain()['natten'].replace('available', '')
AGGREGATIONS = [
    pytest.param(aggregate_natten, marks=pytest.mark.skipif(bool(natten_missing), reason=natten_missing)),
    aggregate_unfold,
]


def results(model, image) -> dict[str, torch.Tensor]:
    found = outputs(model(image))
    parameters = dict(model.named_parameters())
    loss = sum(out.square().mean() for out in found.values())
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return found | {
        f'gradient {name}': gradient
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    }


@pytest.mark.parametrize('training', [False, True], ids=['evaluation', 'training'])
@pytest.mark.parametrize('aggregate', AGGREGATIONS, ids=['natten', 'unfold'])
@pytest.mark.parametrize('model_class', [OverLoCK, OverLoCKBackbone])
def test_published_pipeline_has_the_outputs_and_gradients_of_our_network(model_class, aggregate, training, monkeypatch):
    monkeypatch.setattr(pipeline, 'aggregation', lambda device: aggregate)
    model = model_class(TINY)
    randomise(model)
    model = model.double().train(training)
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, actual = results(model, image), results(published(model), image)
    assert actual.keys() == expected.keys()
    found = deviation(actual, expected)
    assert found['output'] < 1e-11 and found['gradient'] < 1e-10, found


@pytest.mark.parametrize('size', [(13, 13), (14, 17), (30, 21)], ids=str)
@pytest.mark.parametrize('aggregate', AGGREGATIONS, ids=['natten', 'unfold'])
def test_published_contmix_has_the_output_and_gradients_of_the_eager_backend(aggregate, size):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, *size), (2, 6, 7, 7), (2, 12, *size), (25 + 169, 49), (25 + 169,), (2, 9, 9), (2, 25, 25)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    options = {'kernel_sizes': (5, 13), 'num_groups': 2, 'scale': 0.3}
    outs = contmix(*tensors, **options, backend='eager'), pipeline.contmix(*tensors, **options, aggregate=aggregate)
    weight = torch.randn(outs[0].shape, generator=generator, dtype=torch.float64)
    expected, actual = (
        {'output': out, **{f'gradient {i}': g for i, g in enumerate(torch.autograd.grad(out, tensors, weight))}}
        for out in outs
    )
    found = deviation(actual, expected)
    assert found['output'] < 1e-12 and found['gradient'] < 1e-11, found


def test_published_twin_shares_parameters_and_leaves_the_model_alone():
    model = OverLoCKBackbone(TINY).eval()
    twin = published(model)
    assert 'forward' in vars(twin.base_net.stage1[0].ffn)
    assert not any({'forward', 'operator'} & vars(module).keys() for module in model.modules())
    tensors = ([*net.parameters(), *net.buffers()] for net in (model, twin))
    assert all(ours is theirs for ours, theirs in zip(*tensors, strict=True))


def test_published_pipeline_keeps_maps_contiguous():
    twin = published(OverLoCKBackbone(TINY).eval())
    seen = []
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda module, args, out: seen.append(out.is_contiguous()))
    with torch.no_grad():
        twin(torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last))
    assert seen and all(seen)


def test_gradients_of_published_convolutions_are_pytorchs_own(monkeypatch):
    monkeypatch.setattr('overlock.layers.conv.depthwise_conv2d', lambda *arguments: 1 / 0)
    model, image = OverLoCKBackbone(TINY), torch.randn(1, 3, 64, 64)
    published(model)(image)
    with pytest.raises(ZeroDivisionError):
        model.eval()(image)
