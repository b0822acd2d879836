"""Every backend of ContMix gives what the reference gives, forward and backward."""

import pytest
import torch

from overlock.ops import contmix, explain
from overlock.ops.contmix import eager
from tests.overlock.conftest import TOLERANCES, assert_relative

# (height, width, K): odd, non-square, just large enough, and near and far of the dense product's limit.
MAPS = [(13, 13, 13), (14, 14, 13), (13, 29, 13), (21, 17, 13), (7, 7, 7), (7, 8, 7), (12, 9, 7), (5, 5, 5),
        (6, 11, 5), (3, 3, 3), (4, 7, 3)]


def natten_missing() -> str:
    reason = explain()['natten']
    return '' if reason == 'available' else reason


needs_natten = pytest.mark.skipif(bool(natten_missing()), reason=natten_missing() or 'natten runs here')
BACKENDS = ['eager', pytest.param('natten', marks=needs_natten)]


def inputs(height, width, kernel_size, small=3, groups=2, dims=3, batch=2, regions=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(height * 1000 + width)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    half = groups * dims
    taps = small ** 2 + kernel_size ** 2
    tensors = (randn(batch, half, height, width), randn(batch, half, regions, regions),
               randn(batch, 2 * half, height, width), randn(taps, regions ** 2), randn(taps),
               randn(groups, 2 * small - 1, 2 * small - 1), randn(groups, 2 * kernel_size - 1, 2 * kernel_size - 1))
    return tensors, dict(kernel_sizes=(small, kernel_size), num_groups=groups, scale=(2 * dims) ** -0.5)


@pytest.mark.parametrize('size', MAPS, ids=str)
@pytest.mark.parametrize('backend', BACKENDS)
def test_backend_gives_the_output_and_gradients_of_the_reference(backend, size):
    tensors, options = inputs(*size)
    expected = contmix(*tensors, **options, backend='reference')
    actual = contmix(*tensors, **options, backend=backend)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_relative(actual.detach(), expected.detach(), TOLERANCES[torch.float64])
    gradients = (torch.autograd.grad(out, tensors, weight) for out in (actual, expected))
    for ours, truth in zip(*gradients, strict=True):
        assert_relative(ours, truth, TOLERANCES[torch.float64])


@pytest.mark.parametrize('size', [(9, 11, 3), (3, 3, 3), (3, 4, 3)], ids=str)
@pytest.mark.parametrize('backend', ['reference', 'eager'])
def test_gradients_are_those_of_finite_differences(backend, size):
    tensors, options = inputs(*size, groups=1, dims=1, batch=1, regions=2)
    assert torch.autograd.gradcheck(lambda *t: contmix(*t, **options, backend=backend), tensors)


@pytest.mark.parametrize('length', [7, 8, 20])
def test_border_queries_share_the_window_that_moved_inward(length):
    # One-hot weights on a single tap: each query then shows the pixel that this tap of its window sees.
    kernel_size = 7
    value = torch.arange(length * length, dtype=torch.float64).view(1, 1, 1, length, length)
    for tap_row, tap_col in ((0, 0), (3, 6), (6, 6)):
        weights = torch.zeros(1, 1, kernel_size ** 2, length, length, dtype=torch.float64)
        weights[:, :, tap_row * kernel_size + tap_col] = 1
        seen = eager.aggregate(weights, value, kernel_size)[0, 0, 0]
        starts = [min(max(i - kernel_size // 2, 0), length - kernel_size) for i in range(length)]
        expected = torch.tensor([[(r + tap_row) * length + c + tap_col for c in starts] for r in starts])
        assert torch.equal(seen, expected.double())


@pytest.mark.parametrize('size', [(13, 13, 13), (17, 30, 13)], ids=str)
def test_dense_product_and_taps_agree(size, monkeypatch):
    tensors, options = inputs(*size)
    outs = []
    for limit in (0, 1e9):
        monkeypatch.setattr(eager, 'DENSE_LIMIT', limit)
        outs.append(contmix(*tensors, **options, backend='eager').detach())
    assert_relative(outs[0], outs[1], TOLERANCES[torch.float64])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('size', [(13, 14, 13), (20, 24, 13)], ids=str)
def test_narrow_dtypes_stay_near_the_reference_and_keep_their_dtype(size, dtype):
    tensors, options = inputs(*size, dtype=dtype)
    expected = contmix(*(t.double() for t in tensors), **options, backend='reference')
    actual = contmix(*tensors, **options, backend='eager')
    assert actual.dtype == dtype
    assert_relative(actual.detach(), expected.detach(), TOLERANCES[dtype])


def test_large_logits_do_not_overflow_in_float16():
    tensors, options = inputs(14, 14, 13, dtype=torch.float16)
    query = (tensors[0].detach() * 40,)
    assert contmix(*query, *tensors[1:], **options, backend='eager').isfinite().all()


def test_auto_runs_without_options_and_explain_names_every_backend():
    tensors, options = inputs(8, 8, 5)
    assert_relative(contmix(*tensors, **options).detach(), contmix(*tensors, **options, backend='reference').detach(),
                    TOLERANCES[torch.float64])
    reasons = explain()
    assert reasons['reference'] == reasons['eager'] == 'available'
    assert set(reasons) == {'reference', 'eager', 'natten'}


def test_unknown_backend_names_the_known_ones():
    tensors, options = inputs(8, 8, 5)
    with pytest.raises(ValueError, match="'auto' or one of reference, eager, natten, got 'cuda'"):
        contmix(*tensors, **options, backend='cuda')


def test_backend_that_cannot_run_raises_with_the_reason(monkeypatch):
    from overlock.ops.contmix import natten
    monkeypatch.setattr(natten, 'verify', lambda: (False, 'natten is not installed'))
    tensors, options = inputs(8, 8, 5)
    with pytest.raises(RuntimeError, match="'natten' was asked for but cannot run here: natten is not installed"):
        contmix(*tensors, **options, backend='natten')


@pytest.mark.parametrize(('change', 'message'), [
    (dict(kernel_sizes=(3, 9)), 'at least 9 pixels high and wide, got 8x8'),
    (dict(kernel_sizes=(3, 4)), r'must be odd, got \(3, 4\)'),
    (dict(num_groups=5), 'multiple of 2 x 5 groups'),
    (dict(kernel_sizes=(5, 5)), r'weight must have shape \(50, 49\), got \(34, 49\)')])
def test_wrong_shapes_are_one_clear_sentence(change, message):
    tensors, options = inputs(8, 8, 5)
    with pytest.raises(ValueError, match=message):
        contmix(*tensors, **{**options, **change})
