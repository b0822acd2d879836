"""The dilated branches in Triton give what convolutions and BatchNorms give, in Triton's interpreter without a GPU."""

import pytest
import torch
from torch.nn import functional as F

from overlock.layers.large_kernel import BRANCHES
from overlock.ops import dilated, dilated_triton, proof
from overlock.ops.dilated_proof import deviation
from tests.overlock.ops.triton_testing import assert_compiles, needs_triton, newest
from tests.testing import TOLERANCES, assert_relative, check_operator

pytestmark = needs_triton
LAST, FIRST = torch.channels_last, torch.contiguous_format
SIZES, DILATIONS = (5, 3, 3), (1, 1, 2)
SMALL = dict(batch=1, channels=5, size=(9, 6), branches=tuple(zip(SIZES, DILATIONS, strict=True)))


@pytest.fixture(autouse=True)
def on_this_device(device, monkeypatch):
    """Run the operator in Triton, also on the CPU."""
    monkeypatch.setitem(dilated.BACKENDS, device.type, dilated_triton)
    monkeypatch.setattr(proof, '_proofs', {})


def branches(x, weights, dilations, gains, shifts, eps):
    """The same one by one, with the moments."""
    maps = [
        F.conv2d(x, w, padding=w.shape[-1] // 2 * d, dilation=d, groups=len(w))
        for w, d in zip(weights, dilations, strict=True)
    ]
    norms = [
        F.batch_norm(z, None, None, gain, shift, True, eps=eps)
        for z, gain, shift in zip(maps, gains, shifts, strict=True)
    ]
    z = torch.stack(maps).detach()
    return sum(norms), z.mean((1, 3, 4)), z.var((1, 3, 4), unbiased=False)


def inputs(size, device, dtype=torch.float64, sizes=SIZES, memory_format=FIRST):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x = (draw(*size) + 0.5).contiguous(memory_format=memory_format)
    weights = [draw(size[1], 1, k, k) / k for k in sizes]
    gains, shifts = ([draw(size[1]) + 1 for _ in sizes] for _ in range(2))
    return x, weights, gains, shifts


def step(function, x, weights, gains, shifts, dilations=DILATIONS):
    """Return output, moments, and gradients."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (x, *weights, *gains, *shifts)]
    x, *parameters = leaves = [t.requires_grad_() for t in leaves]
    parts = (parameters[i : i + len(weights)] for i in range(0, len(parameters), len(weights)))
    weights, gains, shifts = parts
    y, *moments = function(x, weights, dilations, gains, shifts, 1e-3)
    moments = moments[0][:2] if len(moments) == 1 else moments
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y.detach(), *moments, *torch.autograd.grad(y, leaves, grad)]


# Of several tiles with a last one that is not full, below the kernel's reach, one pixel wide, of odd channels, of more
# blocks than one, of several images.
@pytest.mark.parametrize(
    ('size', 'memory_format'),
    [((1, 3, 9, 17), FIRST), ((2, 17, 1, 3), LAST), ((1, 16, 10, 2), LAST), ((3, 1, 2, 1), FIRST)],
    ids=str,
)
def test_output_moments_and_gradients_are_those_of_the_branches(size, memory_format, device, poisoned):
    arguments = inputs(size, device, memory_format=memory_format)
    ours, truth = (step(function, *arguments) for function in (dilated.dilated_norm, branches))
    for actual, expected in zip(ours, truth, strict=True):
        assert_relative(actual.cpu(), expected.cpu(), 1e-10)
    assert ours[3].dtype == torch.float64 and ours[3].stride() == arguments[0].stride()


@pytest.mark.slow
@pytest.mark.parametrize('kernel_size', [7, 17])
def test_branches_of_the_network_are_right(kernel_size, device, poisoned):
    sizes, dilations = zip((kernel_size, 1), *BRANCHES[kernel_size], strict=True)
    arguments = inputs((1, 2, 7, 9), device, sizes=sizes)
    ours, truth = (step(function, *arguments, dilations) for function in (dilated.dilated_norm, branches))
    for actual, expected in zip(ours, truth, strict=True):
        assert_relative(actual.cpu(), expected.cpu(), 1e-10)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_right_under_autocast(dtype, device, poisoned):
    assert deviation('triton', device, dtype, **SMALL) <= TOLERANCES[dtype]


@pytest.mark.slow
def test_the_proof_of_a_gpu_holds_in_the_interpreter(device, poisoned):
    assert deviation('triton', device) <= proof.LIMITS[torch.float32]


def test_scratch_of_one_block_at_a_time_and_sums_in_parts_change_nothing(device, monkeypatch, poisoned):
    # Two blocks of channels; three tiles in two parts, for each of three groups of taps.
    arguments = inputs((1, 17, 9, 3), device, sizes=(3, 1))
    expected = step(dilated.dilated_norm, *arguments, (1, 1))
    monkeypatch.setattr(dilated_triton, 'SCRATCH', 1)
    monkeypatch.setattr(dilated_triton, 'PROGRAMS', 2 * 3)
    found = step(dilated.dilated_norm, *arguments, (1, 1))
    for actual, truth in zip(found, expected, strict=True):
        assert_relative(actual.cpu(), truth.cpu(), 1e-12)


def test_two_runs_are_equal_to_the_last_bit(device):
    arguments = inputs((1, 3, 9, 5), device, torch.float32, sizes=(3, 1))
    runs = [step(dilated.dilated_norm, *arguments, (1, 1)) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_views_and_a_gradient_without_strides_give_what_copies_give(device, poisoned):
    x, weights, gains, shifts = inputs((2, 3, 4, 5), device)
    view = torch.stack([x, x], 3)[:, :, :, 1].mT.contiguous().mT
    assert torch.equal(view, x) and not view.is_contiguous()
    ours, truth = (dilated_triton.moments(t, weights, DILATIONS) for t in (view, x))
    assert all(torch.equal(*pair) for pair in zip(ours, truth, strict=True))
    ones, factors = (
        torch.ones((), dtype=x.dtype, device=device).expand(x.shape),
        torch.randn(3, 3, 3).to(device).double(),
    )
    ours = dilated_triton.backward(view, ones, x[:0], weights, DILATIONS, factors)
    truth = dilated_triton.backward(x, ones.contiguous(), x[:0], weights, DILATIONS, factors)
    assert all(torch.equal(*pair) for pair in zip(ours, truth, strict=True))


def test_means_far_from_zero_cost_no_digits_of_the_moments(device):
    x, weights, *_ = inputs((2, 3, 9, 5), device, torch.float32, sizes=(3,))
    weights[0].zero_()[:, :, 1, 1] = 1
    x = x * 1e-2 + 1000
    mean, squares = (moment[:, 0].cpu() for moment in dilated_triton.moments(x, weights, (1,))[1:])
    exact = x.cpu().double().flatten(2)
    # What sums of a tile in float32 leave.
    assert_relative(mean, exact.mean(2), 3e-7)
    assert_relative(squares, (exact - exact.mean(2, keepdim=True)).square().sum(2), 1e-2)


def test_a_process_without_images_gives_zeros(device, poisoned):
    x, weights, *_ = inputs((1, 17, 9, 5), device)
    nothing, rows = x[:0], torch.ones(3, 3, 17, dtype=torch.float64, device=device)
    assert all(moment.shape == (0, 3, 17) for moment in dilated_triton.moments(nothing, weights, DILATIONS)[1:])
    sums = dilated_triton.products(nothing, nothing, nothing, weights, DILATIONS, rows[0], torch.zeros_like(rows[0, 0]))
    grad_x, grad_taps = dilated_triton.backward(nothing, nothing, nothing, weights, DILATIONS, rows)
    assert grad_x.shape == nothing.shape and not sums.any() and not grad_taps.any()


def test_only_the_input_is_kept(device):
    x, *others = inputs((1, 16, 40, 40), device, torch.float32, sizes=(3,))
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = t.nbytes
        return t

    parameters = [[t.requires_grad_() for t in part] for part in others]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        dilated.dilated_norm(x.requires_grad_(), parameters[0], (1,), *parameters[1:], 1e-3)
    assert x.nbytes <= sum(kept.values()) < 1.1 * x.nbytes


def test_what_it_cannot_take_is_named(device, monkeypatch):
    x = torch.zeros(1, 1, 2, 2, device=device)
    monkeypatch.setattr(dilated_triton, 'interpreted', lambda: False)
    assert dilated.why_unsupported(x.double()) == 'it takes maps of at most float32'
    assert dilated.why_unsupported(x.to('meta')) == 'it takes maps on CPUs and CUDA devices'
    monkeypatch.setattr(dilated_triton, 'why_no_triton', lambda: 'triton is not installed')
    assert dilated.why_unsupported(x) == 'triton is not installed'


def test_operators_keep_the_rules_of_torch_library(device):
    x, weights, *_ = inputs((1, 3, 4, 5), device, memory_format=LAST)
    wide = dict(dtype=torch.float64, device=device)
    operators, sums = torch.ops.overlock, (torch.randn(3, 3, **wide), torch.randn(3, **wide))
    # The rules do not depend on values; each check runs the kernels again.
    utils, nothing = ('test_schema', 'test_faketensor'), x.new_empty(0)
    for operator, arguments in (
        (operators.dilated_moments, (x, weights, DILATIONS)),
        (operators.dilated_weighted_sum, (x, nothing, weights, DILATIONS, torch.randn(4, 3, **wide))),
        (operators.dilated_products, (x, x, nothing, weights, DILATIONS, *sums)),
        (operators.dilated_backward, (x, x, nothing, weights, DILATIONS, torch.randn(3, 3, 3, **wide))),
    ):
        check_operator(operator.default, arguments, test_utils=utils)


def launch(shape):
    """Launch all kernels."""
    dtype, channels_last = shape
    x, weights, *_ = inputs(
        (2, 56, 50, 84), 'cpu', getattr(torch, dtype), memory_format=LAST if channels_last else FIRST
    )
    dilated_triton.moments(x, weights, DILATIONS)
    rows = torch.zeros(3, len(SIZES), 56, dtype=torch.float64)
    dilated_triton.products(x, x, x[:0], weights, DILATIONS, rows[0], rows[0, 0])
    dilated_triton.backward(x, x, x[:0], weights, DILATIONS, rows)


NAMES = {'pack', 'moments', 'products', 'branch_grad', 'input_grad', 'tap_grad'}
SHAPES = [('bfloat16', False), ('float16', True), ('float32', True)]


@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 86, 89, 90, None], ids=lambda capability: str(capability or 'newest'))
def test_kernels_compile_and_keep_to_registers_and_shared_memory(capability, tmp_path):
    assert_compiles(__name__, capability or newest(), SHAPES, NAMES, str(tmp_path))
