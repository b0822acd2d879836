"""Winograd's convolution gives what the direct sum gives."""

import pytest
import torch
from torch.nn import functional as F

from overlock.ops import winograd
from tests.testing import TOLERANCES, assert_relative


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('shape', [(2, 5, 1, 1), (3, 16, 14, 14), (1, 8, 7, 30), (0, 8, 8, 8)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('tiles', [1, 20, 256])
def test_convolution_is_the_direct_one(shape, dtype, memory_format, tiles, monkeypatch):
    monkeypatch.setattr(winograd, '_TILES', tiles)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(6, shape[1], 3, 3, generator=generator, dtype=dtype)
    bias = torch.randn(6, generator=generator, dtype=dtype)
    for b in (bias, None):
        actual = winograd.conv3x3(x, winograd.transform_kernel(weight), b)
        expected = F.conv2d(x, weight, b, padding=1)
        assert actual.dtype == dtype and actual.shape == expected.shape
        if len(x):
            assert_relative(actual, expected, TOLERANCES[dtype])
