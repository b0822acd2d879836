"""The feed-forward part as one operator equals its layers one by one."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from overlock.layers import ConvFFN
from overlock.ops import feed_forward, proof
from overlock.ops.compiled import why_not_compiled
from tests.testing import assert_relative, randomise, training_step

pytestmark = pytest.mark.skipif(bool(why_not_compiled()), reason='cpp: ' + why_not_compiled())


def maps(*size, dtype=torch.float64, memory_format=torch.channels_last):
    return [torch.randn(size, dtype=dtype).contiguous(memory_format=memory_format) for _ in range(2)]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 10**9], ids=['scaled weights', 'scaled maps'])
def scaled(request, monkeypatch):
    monkeypatch.setattr(feed_forward, 'OWN_WEIGHTS_PIXELS', request.param)


# Wide rows are split into groups of channels, and with many threads high maps into bands.
@pytest.mark.parametrize(
    'size',
    [
        (2, 6, 9, 13),
        (3, 5, 33, 2),
        (1, 11, 2, 32),
        (1, 8, 20, 300),
        (3, 4, 24, 25),
        (1, 8, 70, 1),
        (2, 6, 1, 2),
        (1, 7, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize('count', [1, 2, 7])
def test_output_and_gradients_equal_those_of_the_layers(size, count, threads, monkeypatch):
    threads(count)
    torch.manual_seed(0)
    layer = randomise(ConvFFN(size[1], 4 * size[1] + 3)).double()
    x, grad = maps(*size)
    ours = training_step(layer, x, grad, True, monkeypatch)
    for actual, expected in zip(ours, training_step(layer, x, grad, False, monkeypatch), strict=True):
        assert_relative(actual, expected, 1e-12)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_float32_is_as_near_to_float64_as_the_layers_are(memory_format, scaled, monkeypatch):
    torch.manual_seed(0)
    layer = randomise(ConvFFN(24, 96))
    x, grad = maps(2, 24, 40, 41, dtype=torch.float32, memory_format=memory_format)
    ours, theirs = (training_step(layer, x, grad, fused, monkeypatch) for fused in (True, False))
    exact = training_step(layer.double(), x.double(), grad.double(), False, monkeypatch)
    for actual, composed, truth in zip(ours, theirs, exact, strict=True):
        scale = truth.abs().max()
        assert (actual - truth).abs().max() <= 4 * (composed - truth).abs().max() + 1e-6 * scale


def test_gelu_and_its_derivative_are_exact_everywhere():
    x = torch.cat([torch.linspace(-16, 16, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e15, -1e15])])
    x = x.repeat_interleave(16)[:, None].expand(-1, 16).reshape(1, -1, 8, 16)
    taps = torch.zeros(x.shape[1], 1, 3, 3)
    taps[..., 1, 1] = 1
    operands = feed_forward._pack(x, taps, torch.zeros(x.shape[1]))
    y, squares = torch.ops.overlock_cpu.gelu_conv(*operands)
    ones, zeros = torch.ones_like(operands[2])[None], torch.zeros_like(operands[2])[None]
    slope, _ = torch.ops.overlock_cpu.gelu_conv_backward(operands[0], torch.ones_like(y), *operands[1:], ones, zeros)
    wide = operands[0].double().requires_grad_()
    exact = F.gelu(wide)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    assert (y - exact).abs().div(wide.abs().clamp(1e-30)).max() < 2e-7
    assert (slope - exact_slope).abs().max() < 3e-7
    assert_relative(squares.sum(1)[0, : x.shape[1]], exact.square().sum((0, 1, 2)), 1e-6)


def test_gradients_are_those_of_finite_differences(scaled):
    size = dict(dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 8, 8, **size)
    taps, bias, gamma, beta = (
        torch.randn(*shape, **size) for shape in [(3, 1, 3, 3), (3,), (1, 3, 1, 1), (1, 3, 1, 1)]
    )
    weight, out_bias = torch.randn(2, 3, 1, 1, **size), torch.randn(2, **size)
    assert torch.autograd.gradcheck(feed_forward.feed_forward, (x, taps, bias, gamma, beta, weight, out_bias))


def test_no_map_is_kept_but_the_hidden_one():
    layer, (x, _) = ConvFFN(16, 64), maps(2, 16, 48, 48, dtype=torch.float32)
    hidden = layer.fc1(x).detach().requires_grad_()
    layer.fc1 = nn.Identity()
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(hidden)
    assert sum(kept.values()) < 1.1 * hidden.nbytes


def test_deploy_form_and_one_sample_give_what_the_layers_give(scaled):
    torch.manual_seed(0)
    layer = randomise(ConvFFN(16, 64)).double()
    x, _ = maps(2, 16, 12, 12)
    with torch.no_grad():
        expected = layer(x)
        layer.switch_to_deploy()
        assert_relative(layer(x), expected, 1e-12)
        assert_relative(layer(x[:1]), expected[:1], 1e-12)


def test_a_channel_of_zeros_has_finite_gradients(scaled):
    layer, (x, grad) = ConvFFN(8, 32), maps(2, 8, 9, 9, dtype=torch.float32)
    nn.init.zeros_(layer.dwconv.weight)
    nn.init.zeros_(layer.dwconv.bias)
    layer.dwconv.shortcut = False
    for gradient in torch.autograd.grad(layer(x), list(layer.parameters()), grad):
        assert gradient.isfinite().all()


def test_autocast_in_the_backward_pass_alone_costs_no_digits(scaled):
    torch.manual_seed(0)
    layer, (x, grad) = ConvFFN(8, 32), maps(2, 8, 9, 9, dtype=torch.float32)
    # The first convolution's gradients are PyTorch's matrix products, which autocast narrows.
    parameters = [p for name, p in layer.named_parameters() if not name.startswith('fc1')]
    expected = torch.autograd.grad(layer(x), parameters, grad)
    y = layer(x)
    with torch.autocast('cpu', torch.bfloat16):
        found = torch.autograd.grad(y, parameters, grad)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


CHANGES = ['low precision', 'hook', 'backward hook', 'replaced', 'own forward', 'other GELU', 'traced', 'faked']


@pytest.mark.parametrize('change', CHANGES)
def test_what_it_does_not_take_runs_layer_by_layer(change, monkeypatch):
    def fail(*arguments):
        raise AssertionError('fused')

    layer, (x, _) = ConvFFN(8, 32), maps(1, 8, 9, 9, dtype=torch.float32)
    layer(x)  # proves it
    monkeypatch.setattr(feed_forward, 'feed_forward', fail)
    with pytest.raises(AssertionError, match='fused'):
        layer(x)
    if change == 'low precision':
        with torch.autocast('cpu', torch.bfloat16):
            layer(x)
        layer.bfloat16()(x.bfloat16())
    elif change == 'hook':
        layer.dwconv.register_forward_hook(lambda *arguments: None)
        layer(x)
    elif change == 'backward hook':
        layer.fc2.register_full_backward_hook(lambda *arguments: None)
        layer(x)
    elif change == 'own forward':
        layer.grn.forward = lambda x, forward=layer.grn.forward: forward(x)
        layer(x)
    elif change == 'other GELU':
        layer.act.approximate = 'tanh'
        layer(x)
    elif change == 'replaced':
        layer.fc2 = nn.Sequential(layer.fc2)
        layer(x)
    elif change == 'faked':
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert layer(mode.from_tensor(x)).shape == x.shape
    else:
        torch.jit.trace(layer.eval(), x, check_trace=False)


def test_a_wrong_operator_is_told_once_and_the_layers_run(monkeypatch, caplog):
    layer, (hidden, _), right = ConvFFN(8, 32), maps(2, 32, 9, 9, dtype=torch.float32), feed_forward.feed_forward
    monkeypatch.setattr(proof, '_proofs', {})
    assert layer._fuses(hidden) and not caplog.messages
    monkeypatch.setattr(proof, '_proofs', {})
    monkeypatch.setattr(feed_forward, 'feed_forward', lambda *tensors: right(*tensors) * 1.001)
    assert not layer._fuses(hidden) and not layer._fuses(hidden)
    (message,) = caplog.messages
    assert message.startswith('The feed-forward backend cpp on cpu in float32 deviates from the reference by 1.0e-03')
