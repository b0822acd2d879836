"""The package of implicit matrix products is used when asked for and where it has a kernel, and never required."""

import sys
import types

import pytest
import torch
from torch.nn import functional as F

from overlock.ops import depthwise_conv2d, igemm
from tests.testing import TOLERANCES, assert_relative


class CudaTensor(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device('cuda')


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package, which counts its calls."""
    fake = types.ModuleType(igemm.PACKAGE)
    fake.calls = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            fake.calls.append(x.dtype)
            assert x.is_contiguous() and weight.dtype == x.dtype
            return F.conv2d(x.float(), weight.float(), padding=weight.shape[-1] // 2, groups=len(weight)).to(x.dtype)

    for name in igemm.FUNCTIONS.values():
        setattr(fake, name, Function)
    monkeypatch.setitem(sys.modules, igemm.PACKAGE, fake)
    monkeypatch.setattr(igemm, 'ASKED', True)
    igemm.package.cache_clear()
    yield fake
    igemm.package.cache_clear()


def on_gpu(*size, dtype=torch.float32):
    x = torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x.as_subclass(CudaTensor)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_large_kernels_on_a_gpu_take_the_package(package, dtype):
    x, weight, bias = on_gpu(2, 3, 9, 8, dtype=dtype), on_gpu(3, 1, 7, 7, dtype=dtype), torch.randn(3)
    actual = depthwise_conv2d(x, weight, bias)
    plain = [t.as_subclass(torch.Tensor).float() for t in (x, weight)]
    expected = F.conv2d(*plain, bias, padding=3, groups=3)
    assert package.calls == [dtype] and actual.dtype == dtype
    assert_relative(actual.as_subclass(torch.Tensor), expected, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ('dtype', 'kernel_size', 'dilation', 'asked'),
    [
        (torch.bfloat16, 7, 1, True),
        (torch.float32, 5, 1, True),
        (torch.float32, 7, 2, True),
        (torch.float32, 7, 1, False),
    ],
    ids=str,
)
def test_all_else_does_not(package, monkeypatch, dtype, kernel_size, dilation, asked):
    monkeypatch.setattr(igemm, 'ASKED', asked)
    assert not igemm.fits(on_gpu(1, 3, 9, 9, dtype=dtype), torch.zeros(3, 1, kernel_size, kernel_size), dilation)
    assert igemm.fits(on_gpu(1, 3, 9, 9), torch.zeros(3, 1, 7, 7), 1) == asked
    assert not igemm.fits(torch.zeros(1, 3, 9, 9), torch.zeros(3, 1, 7, 7), 1)


def test_package_that_is_asked_for_but_missing_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, igemm.PACKAGE, None)
    igemm.package.cache_clear()
    with pytest.raises(RuntimeError, match='OVERLOCK_IGEMM=1 asks for .* does not import here .* unset the variable'):
        igemm.package()
