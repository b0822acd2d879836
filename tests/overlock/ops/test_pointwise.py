"""The 1x1 convolution equals PyTorch's, gradients and memory format included, on both sides of its limit."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from overlock.layers import PointwiseConv
from overlock.ops.pointwise import MAX_PIXELS, pointwise_conv2d
from overlock.ops.tracing import keep_operators
from tests.testing import TOLERANCES, assert_relative

SIZES = [(1, 1), (5, 7), (32, MAX_PIXELS // 32), (32, MAX_PIXELS // 32 + 1)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('with_bias', [True, False], ids=['bias', 'no bias'])
def test_output_and_gradients_equal_pytorch(size, memory_format, with_bias):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, *size), (5, 3, 1, 1), (5,)][: 2 + with_bias]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[0] = tensors[0].contiguous(memory_format=memory_format)
    tensors = [t.requires_grad_() for t in tensors]
    actual, expected = pointwise_conv2d(*tensors), F.conv2d(*tensors)
    assert actual.is_contiguous(memory_format=memory_format)
    assert_relative(actual.detach(), expected.detach(), TOLERANCES[torch.float64])
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    gradients = (torch.autograd.grad(out, tensors, grad) for out in (actual, expected))
    for ours, truth in zip(*gradients, strict=True):
        assert ours.shape == truth.shape
        assert_relative(ours, truth, TOLERANCES[torch.float64])


def test_some_channels_of_a_map_are_not_copied():
    x, layer = torch.randn(2, 7, 6, 5).contiguous(memory_format=torch.channels_last), PointwiseConv(3, 5)
    part = x[:, 2:5].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        actual = layer(part)
    assert not any('clone' in event.key or 'conv' in event.key for event in profile.key_averages())
    expected = F.conv2d(part, layer.weight, layer.bias)
    assert_relative(actual.detach(), expected.detach(), TOLERANCES[torch.float32])
    leaves = (part, layer.weight, layer.bias)
    for ours, truth in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (actual, expected)), strict=True):
        assert_relative(ours, truth, TOLERANCES[torch.float32])


def test_one_channel_is_a_matrix_product_in_either_memory_format(monkeypatch):
    monkeypatch.setattr(F, 'conv2d', None)
    layer, x = PointwiseConv(1, 5), torch.randn(2, 1, 6, 5)
    expected = x * layer.weight.view(1, 5, 1, 1) + layer.bias.view(1, 5, 1, 1)
    assert_relative(layer(x).detach(), expected.detach(), TOLERANCES[torch.float32])


@pytest.mark.parametrize(('size', 'is_product'), list(zip(SIZES, [True, True, True, False], strict=True)), ids=str)
def test_small_maps_are_a_matrix_product_unless_something_watches(size, is_product, monkeypatch):
    layer, products = PointwiseConv(3, 5), []
    x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last)
    linear = F.linear
    monkeypatch.setattr(F, 'linear', lambda *arguments: products.append(1) or linear(*arguments))
    expected = layer(x)
    assert bool(products) == is_product
    products.clear()
    with FlopCounterMode(display=False):
        layer(x)
    with keep_operators():
        traced = torch.jit.trace(layer, x, check_trace=False)
    assert_relative(traced(x).detach(), expected.detach(), TOLERANCES[torch.float32])
    targets = {str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes}
    assert 'aten.conv2d.default' in targets and not products


def test_autocast_decides_the_dtype():
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    layer = PointwiseConv(3, 5)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
