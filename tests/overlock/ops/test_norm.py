"""The norm over space equals PyTorch's, gradients included."""

import pytest
import torch

from overlock.layers import ConvFFN, LayerNorm2d
from overlock.ops import spatial_norm
from tests.testing import TOLERANCES, assert_relative, randomise


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('size', [(2, 5, 7, 9), (2, 64, 80, 50), (1, 3, 1, 4), (0, 3, 4, 4)], ids=str)
def test_norm_and_gradient_equal_pytorch(size, memory_format):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(*size[:2], 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual, expected = spatial_norm(x), torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
    assert actual.shape == expected.shape
    gradients = [torch.autograd.grad(norm, x, weight)[0] for norm in (actual, expected)]
    if x.numel():
        assert_relative(actual.detach(), expected.detach(), TOLERANCES[torch.float64])
        assert_relative(*gradients, TOLERANCES[torch.float64])


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradient_of_a_silent_channel_is_zero(memory_format):
    x = torch.zeros(2, 3, 4, 4).contiguous(memory_format=memory_format).requires_grad_()
    spatial_norm(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_norm_of_a_large_float16_map_is_finite(memory_format):
    norm = spatial_norm(torch.full((1, 2, 300, 300), 100, dtype=torch.float16).contiguous(memory_format=memory_format))
    assert norm.dtype == torch.float32
    assert_relative(norm, torch.full((1, 2, 1, 1), 30000.0), TOLERANCES[torch.float32])


@pytest.mark.parametrize('batch', [1, 2])
def test_folded_feed_forward_gives_the_same_for_one_sample_and_for_more(batch):
    ffn = ConvFFN(4, 8).double().eval()
    randomise(ffn)
    x = torch.randn(batch, 4, 9, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected = ffn(x)
        ffn.switch_to_deploy()
        assert_relative(ffn(x), expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_layer_norm_in_bfloat16_has_the_gradients_of_float32_on_a_large_map(memory_format):
    x = torch.randn(2, 4, 180, 180, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.contiguous(memory_format=memory_format)
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        norm = LayerNorm2d(4)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = norm(x.to(dtype))
        assert y.dtype == dtype
        (y * (x > 0)).sum().backward()
        gradients.append((norm.weight.grad, norm.bias.grad))
    for ours, truth in zip(*gradients, strict=True):
        assert_relative(ours, truth, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_layer_norm_of_narrow_parameters_trains(dtype):
    norm = LayerNorm2d(4).to(dtype)
    y = norm(torch.randn(2, 4, 5, 6, dtype=dtype, requires_grad=True))
    y.square().sum().backward()
    assert y.dtype == norm.weight.grad.dtype == dtype
    assert norm.weight.grad.isfinite().all() and norm.weight.grad.abs().max() > 0
