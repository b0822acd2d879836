"""The dilated branches as one operator equal their convolutions and BatchNorms one by one."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from overlock.layers import DilatedReparamConv
from overlock.layers.large_kernel import BRANCHES
from overlock.ops import dilated, dilated_cpp, dilated_triton
from overlock.ops.compiled import why_not_compiled
from overlock.ops.depthwise import weight_gradient
from tests.testing import TOLERANCES, assert_relative, check_operator, randomise, training_step

pytestmark = pytest.mark.skipif(bool(why_not_compiled()), reason='cpp: ' + why_not_compiled())


def pair(kernel_size, channels, dtype, **norm):
    """Return two equal layers with random parameters."""
    layers = []
    for _ in range(2):
        layer = randomise(DilatedReparamConv(channels, kernel_size)).to(dtype).train()
        for bn in layer.modules():
            if isinstance(bn, nn.BatchNorm2d):
                vars(bn).update(norm)
        layers.append(layer)
    layers[1].load_state_dict(layers[0].state_dict())
    return layers


def maps(*size, dtype=torch.float64, memory_format=torch.channels_last):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, generator=generator, dtype=torch.float64) + 0.5)
        .to(dtype)
        .contiguous(memory_format=memory_format)
        for _ in range(2)
    ]


@pytest.mark.parametrize('kernel_size', sorted(BRANCHES))
@pytest.mark.parametrize('size', [(2, 20, 21, 12), (1, 16, 8, 33), (3, 5, 1, 2), (2, 33, 3, 1)], ids=str)
def test_output_gradients_and_statistics_equal_those_of_the_branches(kernel_size, size, monkeypatch):
    one, other = pair(kernel_size, size[1], torch.float64)
    x, grad = maps(*size)
    ours = training_step(one, x, grad, True, monkeypatch)
    for actual, expected in zip(ours, training_step(other, x, grad, False, monkeypatch), strict=True):
        assert_relative(actual, expected, 1e-10)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_maps_are_as_near_to_float64_as_the_branches_are(dtype, memory_format, monkeypatch):
    one, other = pair(13, 24, torch.float64)
    x, grad = maps(2, 24, 30, 41, dtype=dtype, memory_format=memory_format)
    exact = training_step(other, x.double(), grad.double(), False, monkeypatch)
    for layer in (one, other):
        layer.load_state_dict(pair(13, 24, torch.float64)[0].state_dict())
    one, other = one.to(dtype), other.to(dtype)
    y, *gradients = training_step(one, x, grad, True, monkeypatch)
    assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
    for actual, expected in zip([y, *gradients], exact, strict=True):
        assert_relative(actual.double(), expected.double(), TOLERANCES[dtype])


def test_autocast_decides_the_dtype_of_output_and_of_the_input_that_is_kept(monkeypatch):
    one, other = pair(7, 12, torch.float32)
    x, grad = maps(2, 12, 9, 11, dtype=torch.float32)
    exact = training_step(pair(7, 12, torch.float64)[0], x.double(), grad.double(), False, monkeypatch)
    kept = []
    with (
        torch.autocast('cpu', torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.dtype) or t if t.shape == x.shape else t, lambda t: t
        ),
    ):
        y, grad_x, *others = training_step(one, x, grad, True, monkeypatch)
    assert y.dtype == torch.bfloat16 and grad_x.dtype == torch.float32 and kept == [torch.bfloat16]
    for actual, expected in zip([y, grad_x, *others], exact, strict=True):
        assert_relative(actual.double(), expected, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize(('sizes', 'dilations'), [((5, 3, 3), (1, 1, 2)), ((3,), (1,))], ids=str)
def test_gradients_are_those_of_finite_differences(sizes, dilations):
    wide, count = dict(dtype=torch.float64, requires_grad=True), len(sizes)
    x = torch.randn(2, 3, 4, 5, **wide)
    weights = [torch.randn(3, 1, size, size, **wide) for size in sizes]
    gains, shifts = ([torch.randn(3, **wide) for _ in sizes] for _ in range(2))

    def function(x, *parameters):
        weights, gains, shifts = (parameters[i : i + count] for i in range(0, 3 * count, count))
        return dilated.dilated_norm(x, weights, dilations, gains, shifts, 1e-3)[0]

    assert torch.autograd.gradcheck(function, (x, *weights, *gains, *shifts))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_gradients_share_no_memory_and_are_clipped_once(dtype):
    layer = randomise(DilatedReparamConv(20, 9)).to(dtype).train()
    parameters, (x, grad) = list(layer.parameters()), maps(2, 20, 9, 9, dtype=dtype)
    for gradient in (gradients := torch.autograd.grad(layer(x), parameters, grad)):
        before = [other.clone() for other in gradients]
        gradient.mul_(2)
        assert sum(not torch.equal(*pair) for pair in zip(gradients, before, strict=True)) == 1
    layer(x).backward(grad)
    before = [parameter.grad.clone() for parameter in parameters]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for parameter, gradient in zip(parameters, before, strict=True):
        assert_relative(parameter.grad, gradient / norm, 1e-5)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=str)
def test_operators_keep_the_rules_of_torch_library(dtype, memory_format):
    x, grad = maps(2, 19, 9, 8, dtype=dtype, memory_format=memory_format)
    weights = [torch.randn(19, 1, size, size, dtype=dtype) for size in (5, 3)]
    operators = torch.ops.overlock
    check_operator(operators.dilated_moments.default, (x, weights, [1, 2]))
    kept, mean, _ = operators.dilated_moments(x, weights, [1, 2])
    scales = torch.randn(3, 19, dtype=torch.float64)
    check_operator(operators.dilated_weighted_sum.default, (x, kept, weights, [1, 2], scales))
    sums = mean.mean(0), scales[0]
    check_operator(operators.dilated_products.default, (x, grad, kept, weights, [1, 2], *sums))
    coefficients = torch.randn(3, 2, 19, dtype=torch.float64)
    check_operator(operators.dilated_backward.default, (x, grad, kept, weights, [1, 2], coefficients))


@pytest.mark.parametrize(('dtype', 'maps_kept'), [(torch.float32, 2), (torch.bfloat16, 3)], ids=str)
def test_the_input_is_kept_and_the_largest_branch_in_float32(dtype, maps_kept):
    layer, (x, _) = DilatedReparamConv(32, 17).to(dtype), maps(2, 32, 48, 48, dtype=dtype)
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x.requires_grad_())
    assert sum(size for size in kept.values() if size >= x.nbytes) == maps_kept * x.nbytes
    assert sum(kept.values()) < (maps_kept + 0.3) * x.nbytes


def test_factors_of_another_size_are_refused():
    x, weights = torch.randn(2, 20, 9, 8), [torch.randn(20, 1, 3, 3)]
    kept, *_ = torch.ops.overlock.dilated_moments(x, weights, [1])
    with pytest.raises(RuntimeError, match=r'scales must be contiguous, of size \[2, 20\]'):
        torch.ops.overlock.dilated_weighted_sum(x, kept, weights, [1], torch.randn(1, 20))
    with pytest.raises(RuntimeError, match=r'coefficients must be contiguous, of size \[3, 1, 20\]'):
        torch.ops.overlock.dilated_backward(x, x, kept, weights, [1], torch.randn(3, 1, 16))


def test_what_is_kept_of_another_map_is_refused():
    x, weights, rows = torch.randn(2, 20, 9, 8), [torch.randn(20, 1, 3, 3)], torch.randn(3, 1, 20)
    operators = torch.ops.overlock
    for other in (x[:1], x[:, :16], x[:, :, 1:], x.double()):
        kept, *_ = operators.dilated_moments(other, [weights[0][: other.shape[1]]], [1])
        for call in (
            lambda kept=kept: operators.dilated_weighted_sum(x, kept, weights, [1], rows[:2, 0]),
            lambda kept=kept: operators.dilated_products(x, x, kept, weights, [1], rows[0], rows[0, 0]),
            lambda kept=kept: operators.dilated_backward(x, x, kept, weights, [1], rows),
        ):
            with pytest.raises(RuntimeError, match='kept must be what the moments of this map came with'):
                call()


def test_means_far_from_zero_cost_no_digits_of_the_variance(monkeypatch):
    one, other = pair(5, 16, torch.float32)
    x, grad = (t.float() for t in maps(2, 16, 40, 40))
    x = x * 1e-2 + 10
    ours = training_step(one, x, grad, True, monkeypatch)
    theirs = training_step(other, x, grad, False, monkeypatch)
    exact = training_step(pair(5, 16, torch.float64)[0], x.double(), grad.double(), False, monkeypatch)
    for actual, composed, truth in zip(ours, theirs, exact, strict=True):
        scale = truth.abs().max()
        assert (actual - truth).abs().max() <= 4 * (composed - truth).abs().max() + 1e-6 * scale


@pytest.mark.parametrize(
    'norm', [dict(momentum=None), dict(momentum=0.0), dict(track_running_stats=False), dict(eps=0.5)], ids=str
)
def test_statistics_follow_the_settings_of_the_norms(norm, monkeypatch):
    one, other = pair(7, 4, torch.float64, **norm)
    x, grad = maps(2, 4, 9, 9)
    for _ in range(2):
        ours = training_step(one, x, grad, True, monkeypatch)
        for actual, expected in zip(ours, training_step(other, x, grad, False, monkeypatch), strict=True):
            assert_relative(actual, expected, 1e-10)


def test_norms_that_differ_run_one_by_one(monkeypatch):
    def fail(*arguments):
        raise AssertionError('fused')

    monkeypatch.setattr(DilatedReparamConv, '_fused', fail)
    x = torch.randn(2, 4, 9, 9)
    for name, value in (('training', False), ('eps', 1.0), ('affine', False)):
        layer = DilatedReparamConv(4, 7).train()
        setattr(layer.branches['k3_d2'].bn, name, value)
        layer(x)
    DilatedReparamConv(4, 7).eval()(x)
    with pytest.raises(AssertionError, match='fused'):
        DilatedReparamConv(4, 7).train()(x)


@pytest.mark.parametrize('name', ['conv', 'bn', 'branches.k3_d2', 'branches.k3_d2.conv', 'branches.k3_d2.bn'])
@pytest.mark.parametrize('kind', ['forward_hook', 'forward_pre_hook', 'full_backward_hook', 'forward'])
def test_hooks_and_changes_of_the_modules_that_it_stands_for_are_respected(name, kind, monkeypatch):
    one, other = pair(7, 4, torch.float64)
    module, calls = one.get_submodule(name), []
    if kind == 'forward':
        module.forward = lambda x, forward=module.forward: calls.append(x) or forward(x)
    else:
        getattr(module, f'register_{kind}')(lambda *arguments: calls.append(arguments) and None)
    x, grad = maps(2, 4, 9, 9)
    ours = training_step(one, x, grad, True, monkeypatch)
    assert len(calls) == 1
    for actual, expected in zip(ours, training_step(other, x, grad, True, monkeypatch), strict=True):
        assert_relative(actual, expected, 1e-10)


def test_users_turn_it_off(monkeypatch):
    monkeypatch.setattr(dilated, 'EAGER_ASKED', True)
    assert dilated.why_unsupported(torch.zeros(1)) == 'OVERLOCK_DILATED=eager asks for one branch at a time'
    monkeypatch.setattr(DilatedReparamConv, '_fused', lambda *arguments: 1 / 0)
    DilatedReparamConv(4, 7).train()(torch.randn(2, 4, 9, 9))


def test_gpus_take_the_package_that_users_ask_for_instead(monkeypatch):
    monkeypatch.setattr(dilated, 'IGEMM_ASKED', True)
    assert dilated.why_unsupported(torch.zeros(1)) == ''
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device('cuda'))
    assert dilated.why_unsupported(on_gpu) == 'OVERLOCK_IGEMM=1 asks for another operator'


def test_one_value_a_channel_is_refused_as_pytorch_refuses_it():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        DilatedReparamConv(4, 7).train()(torch.randn(1, 4, 1, 1))


@pytest.mark.parametrize('backend', ['cpp', 'triton'])
@pytest.mark.parametrize('branches', [[(7, 1), (3, 2), (3, 3), (5, 1)], [(3, 1)]], ids=str)
def test_weighted_sum_is_that_of_the_branches(backend, branches):
    x = torch.randn(2, 20, 11, 9, dtype=torch.float64)
    sizes, dilations = zip(*branches, strict=True)
    weights = [torch.randn(20, 1, size, size, dtype=torch.float64) for size in sizes]
    *scales, bias = torch.randn(len(branches) + 1, 20, dtype=torch.float64)
    expected = bias.view(-1, 1, 1) + sum(
        scale.view(-1, 1, 1) * F.conv2d(x, w, padding=w.shape[-1] // 2 * d, dilation=d, groups=20)
        for w, d, scale in zip(weights, dilations, scales, strict=True)
    )
    module = dilated_cpp if backend == 'cpp' else dilated_triton
    kept = dilated_cpp.moments(x, weights, dilations)[0] if backend == 'cpp' else x.new_empty(0)
    found = module.weighted_sum(x, kept, weights, dilations, torch.stack([*scales, bias]))
    assert_relative(found, expected, 1e-12)


@pytest.mark.parametrize(('kernel_size', 'dilation'), [(1, 2), (3, 1), (5, 2), (7, 3), (13, 1)])
def test_weight_gradients_in_cpp_equal_those_by_fourier_transform(kernel_size, dilation, monkeypatch):
    x, grad = maps(2, 21, 17, 10)
    compiled = weight_gradient(x, grad, kernel_size, dilation)
    monkeypatch.setattr('overlock.ops.depthwise.why_not_compiled', lambda: 'not compiled')
    assert_relative(compiled, weight_gradient(x, grad, kernel_size, dilation), 1e-12)
