"""Operators on thousands of drawn inputs: sizes, strides, dtypes, large logits, NaN and infinity."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from overlock.ops import contmix, depthwise_conv2d, explain, spatial_norm
from overlock.ops.contmix.inputs import Inputs
from overlock.ops.contmix.reference import aggregate_windows, mix
from overlock.ops.depthwise import weight_gradient
from tests.overlock.ops.fuzz import Case, cases, error, fuzz, lay_out, same_bits
from tests.overlock.ops.triton_testing import needs_triton, repair_interpreter
from tests.testing import TOLERANCES

BACKENDS = [name for name in ('reference', 'eager', 'cpp') if explain()[name] == 'available']
NAMES = ('out', 'query', 'key', 'value', 'weight', 'bias', 'rpb_small', 'rpb_large')
# Roundings on the way to a term of a result: of a logit, its exponential (2 units), the division by their sum, a
# product with a value, the mean, the difference, and the sum of such terms.
ROUNDINGS = 8


@st.composite
def mixes(draw, sizes=(3, 3, 3, 5, 5, 7, 9, 11, 13, 15)):
    """Draw (k, K, H, W, groups, channels of a group, batch, side of the regions) and whether logits are large."""
    small, large = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    most = max(small, large)
    heavy = most >= 9
    height, width = (most + draw(st.sampled_from((0, 0, 1, 1, 2, 5, 20 - most))) for _ in 'hw')
    batch = draw(st.sampled_from((0, 1, 1, 2) if heavy else (0, 1, 2, 2, 3)))
    groups = draw(st.integers(1, 2 if heavy else 3))
    dims = draw(st.sampled_from((1, 2, 17) if heavy else (1, 1, 2, 3, 5, 8, 16, 17)))
    return (small, large, height, width, groups, dims, batch, draw(st.integers(1, 3))), draw(st.booleans())


def fill(sizes: tuple[int, ...], is_large: bool, generator: torch.Generator) -> tuple[list[Tensor], float]:
    """Return the inputs of `contmix` and the gradient of its output, float64, and the scale of the affinities.

    Large logits, up to 1e4, are whole multiples of one power of two: no dtype rounds them in any order of sums. Between
    others that are nearly as large, rounding alone would choose.
    """
    small, large, height, width, groups, dims, batch, regions = sizes
    taps = small**2 + large**2
    shapes = [
        (batch, groups * dims, height, width),
        (batch, groups * dims, regions, regions),
        (batch, 2 * groups * dims, height, width),
        (taps, regions**2),
        (taps,),
        (groups, 2 * small - 1, 2 * small - 1),
        (groups, 2 * large - 1, 2 * large - 1),
        (batch, 2 * groups * dims, height, width),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if not is_large:
        tensors[3] /= regions
        return tensors, (2 * dims) ** -0.5
    unit = 2.0 ** math.floor(math.log2(1e4 / (dims * regions**2 + 2)))
    for i, factor in ((0, 2 * unit), (1, 1), (3, 1), (4, unit), (5, unit), (6, unit)):
        tensors[i] = tensors[i].round().clamp(-1, 1) * factor
    # Sums of products with queries as large stay in float16's range.
    tensors[7] /= 64
    return tensors, 0.5


def run(tensors: list[Tensor], grad: Tensor, options: dict, backend: str) -> list[Tensor]:
    """Return output and gradients, by `NAMES`."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = contmix(*tensors, **options, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


class Truth(NamedTuple):
    values: list[Tensor]  # by `NAMES`
    scales: list[float]  # of each, the largest sum of magnitudes of the terms that it sums up
    logit: float  # likewise of the logits


def solve(tensors: list[Tensor], grad: Tensor, options: dict) -> Truth:
    """Return what the reference gives in float64."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    x = Inputs(*tensors, **options)
    query, key = (t.flatten(2).unflatten(1, (x.num_groups, -1)) for t in (x.query * x.scale, x.key))
    affinity = torch.einsum('bgdn,bgdm->bgnm', query, key)
    logits = torch.einsum('bgnm,tm->bgnt', affinity, x.weight) + x.bias
    slopes, sums = [], []
    grads = iter(grad.abs().chunk(2, 1))

    def aggregate(weights: Tensor, value: Tensor, size: int) -> Tensor:
        """Note the magnitudes that the gradients of logits and value sum up."""
        with torch.enable_grad():
            ones = torch.zeros_like(weights, requires_grad=True)
            given = next(grads).unflatten(1, (x.num_groups, -1))
            magnitude = value.detach().abs().requires_grad_()
            (dweights,) = torch.autograd.grad(aggregate_windows(ones, magnitude, size), ones, given)
            out = aggregate_windows(weights.detach(), magnitude, size)
            sums.append((out.detach(), *torch.autograd.grad(out, magnitude, given)))
        mean = (weights * dweights).sum(-1, keepdim=True)
        slopes.append((weights * (dweights + mean)).detach().flatten(2, 3))
        return aggregate_windows(weights, value, size)

    out = mix(x, logits, aggregate)
    values = [out.detach(), *torch.autograd.grad(out, tensors, grad)]
    slope, weight, near, far = torch.cat(slopes, -1), x.weight.abs(), query.abs(), key.abs()
    totals = [
        torch.cat([part[0] for part in sums]),
        x.scale * torch.einsum('bgnt,tm,bgdm->bgdn', slope, weight, far),
        torch.einsum('bgnt,tm,bgdn->bgdm', slope, weight, near),
        torch.cat([part[1] for part in sums]),
        torch.einsum('bgnt,bgdn,bgdm->tm', slope, near, far),
        slope.sum((0, 1, 2)),
        *(part.sum((0, 2)) for part in slopes),
    ]
    logit = torch.einsum('bgdn,bgdm,tm->bgnt', near, far, weight)
    return Truth(
        values,
        [t.detach().abs().max().item() if t.numel() else 0 for t in totals],
        logit.max().item() if logit.numel() else 0,
    )


def check_mix(case: Case, sizes: tuple[int, ...], is_large: bool, backends: list[str]) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    values, scale = fill(sizes, is_large, generator)
    values = [case.spoil(i, v.to(case.dtype)) for i, v in enumerate(values)]
    guarded = [lay_out(v, layout) for v, layout in zip(values, case.layouts, strict=True)]
    *tensors, grad = (g.tensor for g in guarded)
    options = dict(kernel_sizes=sizes[:2], num_groups=sizes[4], scale=scale)
    truth = solve([t.double() for t in tensors], grad.double(), options)
    same = run(tensors, grad, options, 'reference')
    for backend in backends:
        # What rounds a logit changes its weight by as much; so does the log-sum-exp that Triton's backward pass takes.
        logit = 0 if is_large and backend != 'triton' else truth.logit
        # In float64 the truth is rounded as often as what is compared with it.
        rounded = 2 if case.dtype == torch.float64 else 1
        unit = rounded * torch.finfo(case.dtype).eps / 2 * (ROUNDINGS + logit)
        ours, again = (run(tensors, grad, options, backend) for _ in range(2))
        for name, first, second, exact, near, total in zip(
            NAMES, ours, again, truth.values, same, truth.scales, strict=True
        ):
            at = f'{backend}: {name} of {case} {sizes} {is_large}'
            assert same_bits(first, second), at
            assert first.dtype == case.dtype and first.shape == exact.shape, at
            if case.special is not None:
                check_lost(first, exact, sizes[4], at)
                continue
            errors = error(first, exact), error(near, exact)
            assert errors[0] <= 2 * errors[1] + unit * total, (at, errors, unit * total)
        assert all(g.is_untouched() for g in guarded), at


def check_lost(actual: Tensor, exact: Tensor, groups: int, at: str) -> None:
    """Check that what is not finite shows, and stays in its image and group.

    In half precision it may not stay: where a row has an odd length, oneDNN multiplies what is behind it by zero.
    """
    shows, there = ~actual.isfinite(), ~exact.isfinite()
    assert not (there & ~shows).any(), (at, 'lost')
    if actual.ndim == 4 and actual.itemsize > 2 and actual.numel():
        shows, there = (t.unflatten(1, (groups, -1)).flatten(2).any(2) for t in (shows, there))
        assert torch.equal(shows, there), (at, 'spread')


@given(cases(8), mixes())
@fuzz(60)
def test_contmix(case, drawn):
    check_mix(case, *drawn, BACKENDS)


@pytest.mark.slow
@given(cases(8), mixes())
@fuzz(2000)
def test_contmix_at_length(case, drawn):
    check_mix(case, *drawn, BACKENDS)


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason='the interpreter runs where there is no GPU')
def test_contmix_in_triton():
    @given(cases(8), mixes((3, 3, 5)))
    @fuzz(10)
    def run_all(case, drawn):
        check_mix(case, *drawn, ['triton'])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_INTERPRET', '1')
        repair_interpreter(patch)
        run_all()


@st.composite
def convolutions(draw):
    """Draw sizes (H, W, kernel, dilation, channels, batch)."""
    return (
        draw(st.integers(1, 20)),
        draw(st.integers(1, 20)),
        draw(st.sampled_from(range(3, 16, 2))),
        draw(st.sampled_from((1, 1, 2, 3))),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 3)),
    )


def check_weight_gradient(case: Case, sizes: tuple[int, ...]) -> None:
    """Compare with the gradient that PyTorch gives in float64."""
    height, width, size, dilation, channels, batch = sizes
    generator = torch.Generator().manual_seed(case.seed)
    values = [torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64) for _ in 'xg']
    guarded = [lay_out(case.spoil(i, v.to(case.dtype)), case.layouts[i]) for i, v in enumerate(values)]
    x, grad = (g.tensor for g in guarded)
    first, second = (weight_gradient(x, grad, size, dilation) for _ in range(2))
    exact, near, total = (
        torch.nn.grad.conv2d_weight(
            a, (channels, 1, size, size), b, padding=size // 2 * dilation, dilation=dilation, groups=channels
        )
        for a, b in ((x.double(), grad.double()), (x.float(), grad.float()), (x.double().abs(), grad.double().abs()))
    )
    assert same_bits(first, second)
    assert first.dtype == torch.promote_types(case.dtype, torch.float32) and first.shape == exact.shape
    if case.special is not None:
        # A transform spreads it over the taps of its channel, but for those that see nothing but padding.
        spread, there = ((~t.isfinite()).flatten(1).any(1) for t in (first, exact))
        assert torch.equal(spread, there)
    else:
        # A transform sums all products of a channel, and each of its steps, two for each doubling of the map, rounds.
        unit = torch.finfo(first.dtype).eps / 2 * 2 * math.log2(4 * 20**2)
        energy = (x.double().square().sum((0, 2, 3)) * grad.double().square().sum((0, 2, 3))).sqrt().max().item()
        assert error(first, exact) <= 2 * error(near, exact) * (first.dtype == torch.float32) + unit * energy
    assert all(g.is_untouched() for g in guarded)


@given(cases(2), convolutions())
@fuzz(60)
def test_depthwise_weight_gradient(case, sizes):
    check_weight_gradient(case, sizes)


@pytest.mark.slow
@given(cases(2), convolutions())
@fuzz(2000)
def test_depthwise_weight_gradient_at_length(case, sizes):
    check_weight_gradient(case, sizes)


def check_convolution(case: Case, sizes: tuple[int, ...]) -> None:
    """Compare forward and both gradients with those of PyTorch in float64; PyTorch's own kernels are most of it."""
    height, width, size, dilation, channels, batch = sizes
    generator = torch.Generator().manual_seed(case.seed)
    shapes = (batch, channels, height, width), (channels, 1, size, size), (channels,), (batch, channels, height, width)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in shapes]
    guarded = [lay_out(v, layout) for v, layout in zip(values, case.layouts, strict=True)]
    *tensors, grad = (g.tensor for g in guarded)
    results = []
    for function, dtype in ((depthwise_conv2d, case.dtype), (depthwise_conv2d, case.dtype), (plain, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in tensors]
        out = function(*inputs, dilation)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))])
    for first, second, exact in zip(*results, strict=True):
        assert same_bits(first, second) and first.dtype == case.dtype
        assert error(first, exact) <= TOLERANCES[case.dtype] * max(1, exact.abs().max().item() if exact.numel() else 0)
    assert all(g.is_untouched() for g in guarded)


def plain(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2 * dilation, dilation=dilation, groups=len(weight))


@given(cases(4), convolutions())
@fuzz(60)
def test_depthwise_convolution(case, sizes):
    check_convolution(case, sizes)


@pytest.mark.slow
@given(cases(4), convolutions())
@fuzz(2000)
def test_depthwise_convolution_at_length(case, sizes):
    check_convolution(case, sizes)


def check_norm(case: Case, sizes: tuple[int, ...]) -> None:
    """Compare the norm and its gradient with those of PyTorch in float64."""
    height, width, _, _, channels, batch = sizes
    generator = torch.Generator().manual_seed(case.seed)
    values = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    guarded = lay_out(case.spoil(0, (100 * values).to(case.dtype)), case.layouts[0])
    grad = torch.randn(batch, channels, 1, 1, generator=generator, dtype=torch.float64).float()
    wide = torch.promote_types(case.dtype, torch.float32)
    results = []
    for function, dtype in ((spatial_norm, case.dtype), (spatial_norm, case.dtype), (plain_norm, torch.float64)):
        x = guarded.tensor.detach().to(dtype).requires_grad_()
        norm = function(x)
        results.append([norm.detach(), *torch.autograd.grad(norm, x, grad.to(norm.dtype))])
    for first, second, exact, dtype in zip(*results, (wide, case.dtype), strict=True):
        assert same_bits(first, second) and first.dtype == dtype and first.shape == exact.shape
        lost = ~exact.isfinite()
        assert (
            not (lost & first.isfinite()).any()
            and not (~lost.flatten(2).any(2) & ~first.isfinite().flatten(2).all(2)).any()
        )
        # Each square of the sum may round it once, which the root halves; then there are a few products.
        unit = (height * width / 2 + 10) * torch.finfo(dtype).eps / 2
        assert error(first[~lost], exact[~lost]) <= unit * (exact[~lost].abs().max().item() if (~lost).any() else 0)
    assert guarded.is_untouched()


def plain_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)


@given(cases(1), convolutions())
@fuzz(60)
def test_spatial_norm(case, sizes):
    check_norm(case, sizes)


@pytest.mark.slow
@given(cases(1), convolutions())
@fuzz(2000)
def test_spatial_norm_at_length(case, sizes):
    check_norm(case, sizes)
