"""The depthwise convolution equals PyTorch's, gradients included."""

import sys
import types

import pytest
import torch
from torch.nn import functional as F

from overlock.ops import depthwise, depthwise_conv2d
from tests.testing import TOLERANCES, assert_relative, check_operator


@pytest.mark.parametrize('size', [(20, 31), (11, 11), (3, 30), (1, 1), (64, 5)], ids=str)
@pytest.mark.parametrize('kernel_size', [7, 11, 13, 17])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_output_and_gradients_equal_pytorch(size, kernel_size, memory_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64).contiguous(memory_format=memory_format)
    weight = torch.randn(3, 1, kernel_size, kernel_size, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    actual = depthwise_conv2d(*tensors)
    expected = F.conv2d(*tensors, padding=kernel_size // 2, groups=3)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    assert_relative(actual.detach(), expected.detach(), TOLERANCES[torch.float64])
    gradients = (torch.autograd.grad(out, tensors, grad) for out in (actual, expected))
    for ours, truth in zip(*gradients, strict=True):
        assert_relative(ours, truth, TOLERANCES[torch.float64])


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != 'AVX512', reason='for processors with AVX-512')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_slow_kernel_runs_as_a_larger_one(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 20, 15, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(3, 1, 13, 13, generator=generator) / 13).to(dtype)
    exact = F.conv2d(x.double(), weight.double(), padding=6, groups=3)
    sizes, conv2d = [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda *args, **kw: sizes.append(args[1].shape[-1]) or conv2d(*args, **kw))
    assert_relative(depthwise_conv2d(x, weight).double(), exact, TOLERANCES[dtype])
    assert sizes == [15]
    depthwise_conv2d(x.contiguous(), weight)
    assert sizes == [15, 13]


def test_gradients_are_those_of_finite_differences():
    x, weight = (torch.randn(1, 1, *size, dtype=torch.float64, requires_grad=True) for size in ((6, 4), (11, 11)))
    assert torch.autograd.gradcheck(depthwise_conv2d, (x, weight))


@pytest.mark.parametrize(('kernel_size', 'dilation'), [(3, 7), (9, 2), (7, 2), (3, 2), (5, 1)])
@pytest.mark.parametrize('size', [(48, 64), (5, 30)], ids=str)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_bfloat16_gradients_of_dilated_kernels_are_near_those_of_float32(kernel_size, dilation, size, memory_format):
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(2, 56, *size, generator=generator).bfloat16().contiguous(memory_format=memory_format)
        for _ in range(2)
    )
    weight = torch.randn(56, 1, kernel_size, kernel_size, generator=generator).bfloat16()
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [t.to(dtype).requires_grad_() for t in (x, weight)]
        y = (
            depthwise_conv2d(*tensors, dilation=dilation)
            if dtype == torch.bfloat16
            else F.conv2d(*tensors, padding=kernel_size // 2 * dilation, dilation=dilation, groups=56)
        )
        gradients.append(torch.autograd.grad(y, tensors, grad.to(dtype)))
    for ours, truth in zip(*gradients, strict=True):
        assert_relative(ours, truth, TOLERANCES[torch.bfloat16])


def test_gradients_keep_the_dtype_of_a_bfloat16_weight():
    x = torch.randn(1, 2, 12, 12, dtype=torch.bfloat16)
    weight = torch.randn(2, 1, 13, 13, dtype=torch.bfloat16, requires_grad=True)
    depthwise_conv2d(x, weight).sum().backward()
    expected = torch.autograd.grad(
        F.conv2d(x.double(), wide := weight.detach().double().requires_grad_(), padding=6, groups=2).sum(), wide
    )[0]
    assert weight.grad.dtype == torch.bfloat16
    assert_relative(weight.grad, expected, TOLERANCES[torch.bfloat16])


def test_weight_gradient_keeps_the_rules_of_torch_library():
    x, grad = (torch.randn(2, 3, 20, 14, dtype=torch.float64) for _ in range(2))
    for kernel_size, dilation in ((13, 1), (3, 2)):
        check_operator(torch.ops.overlock.depthwise_weight_gradient.default, (x, grad, kernel_size, dilation))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kernel_size', 'dilation', 'dtype'), [(13, 1, torch.float64), (7, 2, torch.bfloat16)], ids=str
)
def test_compiled_gradients_are_our_own_too(kernel_size, dilation, dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(2, 8, 20, 24, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight = torch.randn(8, 1, kernel_size, kernel_size, generator=generator).to(dtype)
    tensors = [t.requires_grad_() for t in (x, weight)]
    gradients = []
    for function in (torch.compile(depthwise_conv2d, fullgraph=True), depthwise_conv2d):
        y = function(*tensors, dilation=dilation)
        gradients.append(torch.autograd.grad(y, tensors, grad))
    for ours, truth in zip(*gradients, strict=True):
        assert_relative(ours, truth, TOLERANCES[dtype])


class CudaTensor(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    device = torch.device('cuda')


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package, which counts its calls."""
    fake = types.ModuleType(depthwise.IGEMM)
    fake.calls = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            fake.calls.append(x.dtype)
            assert x.is_contiguous() and weight.dtype == x.dtype
            return F.conv2d(x.float(), weight.float(), padding=weight.shape[-1] // 2, groups=len(weight)).to(x.dtype)

    for name in depthwise.IGEMM_FUNCTIONS.values():
        setattr(fake, name, Function)
    monkeypatch.setitem(sys.modules, depthwise.IGEMM, fake)
    monkeypatch.setattr(depthwise, 'IGEMM_ASKED', True)
    depthwise._igemm.cache_clear()
    yield fake
    depthwise._igemm.cache_clear()


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
def test_other_convolutions_do_not_take_the_package(package, monkeypatch, dtype, kernel_size, dilation, asked):
    monkeypatch.setattr(depthwise, 'IGEMM_ASKED', asked)
    depthwise_conv2d(
        on_gpu(1, 3, 9, 9, dtype=dtype), on_gpu(3, 1, kernel_size, kernel_size, dtype=dtype), None, dilation
    )
    depthwise_conv2d(torch.zeros(1, 3, 9, 9), torch.zeros(3, 1, 7, 7))
    assert not package.calls


def test_package_that_is_asked_for_but_missing_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, depthwise.IGEMM, None)
    depthwise._igemm.cache_clear()
    with pytest.raises(RuntimeError, match='OVERLOCK_IGEMM=1 asks for .* does not import here .* unset the variable'):
        depthwise._igemm()
