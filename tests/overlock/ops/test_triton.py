"""The Triton kernels give what dense attention gives: on a GPU where there is one, else in Triton's interpreter."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest
import torch

from overlock.ops import contmix, gpu
from overlock.ops.contmix import triton as backend
from overlock.ops.contmix.inputs import Projected
from tests.overlock.ops.triton_testing import assert_compiles, needs_triton, newest
from tests.testing import ROOT, TOLERANCES, assert_relative

WIDE, HALF, BRAIN = torch.float64, torch.float16, torch.bfloat16
LAST, FIRST = torch.channels_last, torch.contiguous_format

# dtype, (batch, groups, channels of a group, height, width, small kernel, large kernel), memory format. Maps just large
# enough, odd, non-square, of several tiles with a last one that is not full, and of tiles away from all borders; 16
# channels last are read in place, others are packed.
CASES = [
    (WIDE, (2, 2, 1, 4, 5, 1, 3), LAST),
    (WIDE, (1, 1, 16, 3, 35, 1, 3), LAST),
    (torch.float32, (1, 1, 10, 7, 7, 5, 7), FIRST),
    (BRAIN, (1, 1, 20, 5, 18, 3, 5), LAST),
    (HALF, (1, 1, 14, 6, 9, 3, 5), FIRST),
]
SLOW_CASES = [
    (WIDE, (2, 1, 10, 13, 13, 5, 13), LAST),
    (torch.float32, (1, 2, 16, 14, 37, 5, 13), LAST),
    (BRAIN, (1, 1, 10, 16, 19, 5, 13), FIRST),
    (HALF, (1, 2, 10, 14, 14, 5, 13), FIRST),
    (WIDE, (1, 1, 8, 9, 51, 5, 7), FIRST),
    (WIDE, (1, 1, 3, 19, 20, 3, 17), FIRST),
    (WIDE, (1, 1, 20, 7, 8, 5, 7), LAST),
]


def inputs(dtype, sizes, memory_format=FIRST, device=None):
    batch, groups, dims, height, width, small, large = sizes
    generator = torch.Generator().manual_seed(height * 1000 + width)
    taps = small**2 + large**2
    shapes = [
        (batch, groups * dims, height, width),
        (batch, groups, dims, taps),
        (batch, 2 * groups * dims, height, width),
        (taps,),
        (groups, 2 * small - 1, 2 * small - 1),
        (groups, 2 * large - 1, 2 * large - 1),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[1] *= dims**-0.5
    # Parameters stay float32 beside maps in half precision.
    dtypes = [dtype] * 3 + [torch.float32 if dtype.itemsize == 2 else dtype] * 3
    tensors = [tensor.to(device, dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    for index in (0, 2):
        tensors[index] = tensors[index].to(memory_format=memory_format)
    return Projected(*tensors)


def dense(query, kernel, value, bias, rpb_small, rpb_large):
    """The same from dense attention: each pixel with each, what is outside the window masked."""
    batch, groups, dims, _ = kernel.shape
    height, width = value.shape[2:]
    row, col = (grid.flatten() for grid in torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij'))
    query = query.reshape(batch, groups, dims, -1)
    outs, norms, first = [], [], 0
    for rpb, half in zip((rpb_small, rpb_large), value.chunk(2, 1), strict=True):
        size = (rpb.shape[-1] + 1) // 2
        start_row, start_col = ((x - size // 2).clamp(0, length - size) for x, length in ((row, height), (col, width)))
        # Queries by keys: which tap a key is, where it is one.
        tap_row, tap_col = row - start_row[:, None], col - start_col[:, None]
        seen = (tap_row >= 0) & (tap_row < size) & (tap_col >= 0) & (tap_col < size)
        tap = first + (tap_row.clamp(0, size - 1) * size + tap_col.clamp(0, size - 1))
        logits = torch.einsum('bgcn,bgct->bgnt', query, kernel).gather(3, tap.expand(batch, groups, -1, -1)) + bias[tap]
        offsets = (x - x[:, None] + size - 1 for x in (row, col))
        logits = logits + rpb[(slice(None), *(x.clamp(0, 2 * size - 2) for x in offsets))]
        logits = logits.masked_fill(~seen, -torch.inf)
        outs.append(torch.einsum('bgnm,bgcm->bgcn', logits.softmax(-1), half.reshape(batch, groups, dims, -1)))
        norms.append(logits.logsumexp(-1).unflatten(-1, (height, width)))
        first += size**2
    return torch.cat(outs, 1).reshape(value.shape), torch.stack(norms)


def both(tensors):
    """Output, log-sum-exp and six gradients of the kernels for a gradient drawn from a fixed seed."""
    out, norm = backend.forward(tensors)
    return out, norm, *backend.backward(incoming(out), norm, tensors)


def incoming(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)


@needs_triton
@pytest.mark.parametrize(
    ('dtype', 'sizes', 'memory_format'),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_output_log_sum_exp_and_gradients_are_those_of_dense_attention(dtype, sizes, memory_format, device, poisoned):
    tensors = inputs(dtype, sizes, memory_format, device)
    out, norm, *gradients = both(tensors)
    for ours, tensor in zip((out, *gradients), (tensors[2], *tensors), strict=True):
        assert (ours.dtype, ours.shape, ours.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert norm.dtype == (WIDE if dtype == WIDE else torch.float32)
    wide = [tensor.cpu().double().requires_grad_() for tensor in tensors]
    expected, expected_norm = dense(*wide)
    assert_relative(out.cpu(), expected.detach(), TOLERANCES[dtype])
    assert_relative(norm.cpu(), expected_norm.detach(), TOLERANCES[dtype])
    expected_gradients = torch.autograd.grad(expected, wide, incoming(out).cpu().double())
    for ours, truth in zip(gradients, expected_gradients, strict=True):
        assert_relative(ours.cpu(), truth, TOLERANCES[dtype])


@needs_triton
def test_two_runs_are_equal_to_the_last_bit(device):
    tensors = inputs(torch.float32, (1, 1, 3, 5, 18, 3, 5), device=device)
    for first, second in zip(both(tensors), both(tensors), strict=True):
        assert torch.equal(first, second)


@needs_triton
def test_gradients_of_taps_do_not_depend_on_how_many_partial_sums_there_are(device, monkeypatch, poisoned):
    # Six runs of query rows, four at the borders and two between, in two sums instead of six.
    tensors = inputs(WIDE, (1, 1, 3, 9, 5, 3, 5), device=device)
    out, norm = backend.forward(tensors)
    expected = backend.backward(incoming(out), norm, tensors)
    monkeypatch.setattr(backend, 'PARTIALS', 2)
    for ours, truth in zip(backend.backward(incoming(out), norm, tensors), expected, strict=True):
        assert_relative(ours.cpu(), truth.cpu(), TOLERANCES[WIDE])


@needs_triton
def test_contmix_and_its_gradients_run_the_kernels(device):
    shapes = ((2, 4, 4, 5), (2, 4, 2, 2), (2, 8, 4, 5), (10, 4), (10,), (2, 1, 1), (2, 5, 5))
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=WIDE).to(device).requires_grad_() for shape in shapes]
    options = dict(kernel_sizes=(1, 3), num_groups=2, scale=0.5)
    outs = [contmix(*tensors, **options, backend=name) for name in ('triton', 'reference')]
    for ours, truth in zip(*([out, *torch.autograd.grad(out.square().sum(), tensors)] for out in outs), strict=True):
        assert_relative(ours.detach().cpu(), truth.detach().cpu(), TOLERANCES[WIDE])


@needs_triton
def test_views_give_what_copies_of_them_give(device, poisoned):
    tensors = inputs(WIDE, (2, 2, 3, 3, 4, 3, 3), device=device)
    views = Projected(
        torch.stack([tensors[0], tensors[0]], 2)[:, :, 1],
        tensors[1].transpose(1, 3).contiguous().transpose(1, 3),
        tensors[2].mT.contiguous().mT,
        tensors[3].repeat_interleave(2)[::2],
        tensors[4].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.nn.functional.pad(tensors[5], (1, 1))[..., 1:-1],
    )
    assert not any(view.is_contiguous() for view in views)
    assert all(torch.equal(view, tensor) for view, tensor in zip(views, tensors, strict=True))
    for ours, truth in zip(both(views), both(tensors), strict=True):
        assert torch.equal(ours, truth)


@needs_triton
def test_gradient_of_a_sum_is_taken_though_it_has_no_strides(device):
    tensors = inputs(WIDE, (1, 1, 3, 3, 4, 3, 3), device=device)
    out, norm = backend.forward(tensors)
    ones = torch.ones((), dtype=out.dtype, device=device).expand(out.shape)
    for ours, truth in zip(
        backend.backward(ones, norm, tensors), backend.backward(ones.contiguous(), norm, tensors), strict=True
    ):
        assert torch.equal(ours, truth)


@needs_triton
@pytest.mark.parametrize('tap', [(0, 0), (2, 4), (4, 4)], ids=str)
def test_border_queries_share_the_window_that_moved_inward(tap, device):
    # One tap outweighs all others: each query then shows the pixel that this tap of its window sees.
    height, width, size = 6, 18, 5
    shape = (1, 1, 1, height, width, 3, size)
    tensors = Projected(*(torch.zeros_like(tensor) for tensor in inputs(WIDE, shape, device=device)))
    tensors.value[0, 1] = torch.arange(height * width).view(height, width)
    tensors.bias[9 + tap[0] * size + tap[1]] = 1e4
    starts = [[min(max(i - size // 2, 0), length - size) for i in range(length)] for length in (height, width)]
    expected = torch.tensor([[(y + tap[0]) * width + x + tap[1] for x in starts[1]] for y in starts[0]])
    assert torch.equal(backend.forward(tensors)[0][0, 1].cpu(), expected.double())


@needs_triton
def test_large_logits_do_not_overflow(device):
    tensors = inputs(HALF, (1, 1, 8, 5, 6, 3, 5), device=device)
    tensors.query.mul_(500)
    out, norm = backend.forward(tensors)
    assert norm.abs().max() > 300
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in backend.backward(incoming(out), norm, tensors))


@needs_triton
def test_values_far_from_zero_cost_the_gradients_no_digits(device):
    # The gradient of the softmax is a difference, of what grows with the mean of the values.
    tensors = inputs(BRAIN, (1, 1, 4, 5, 6, 3, 5), device=device)
    tensors.value.add_(16)
    out, norm = backend.forward(tensors)
    wide = [tensor.cpu().double().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(dense(*wide)[0], wide, incoming(out).cpu().double())
    for ours, truth in zip(backend.backward(incoming(out), norm, tensors), expected, strict=True):
        assert_relative(ours.cpu(), truth, TOLERANCES[BRAIN])


def test_importing_the_backend_and_asking_whether_it_runs_leaves_triton_alone():
    code = (
        'import sys, torch; before = "triton" in sys.modules; from overlock.ops.contmix import triton; '
        'triton.why_unavailable(); assert before or "triton" not in sys.modules'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def asked_afresh(monkeypatch):
    """Let `why_unavailable` look again at what is installed, before and after the test, with no interpreter."""
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    gpu._missing.cache_clear()
    yield
    monkeypatch.undo()
    gpu._missing.cache_clear()


def test_a_missing_triton_is_named(monkeypatch, asked_afresh):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    assert backend.why_unavailable() == 'triton is not installed'


@needs_triton
def test_an_old_triton_is_named(monkeypatch, asked_afresh):
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: '3.4.0')
    assert backend.why_unavailable() == 'triton 3.4.0 is older than 3.5'


@needs_triton
def test_a_missing_or_old_gpu_is_named_and_the_interpreter_needs_none(monkeypatch, asked_afresh):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert backend.why_unavailable() == 'no CUDA device'
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert backend.why_unavailable() == ''
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (7, 5))
    assert backend.why_unavailable() == 'CUDA capability 7.5 is below 8.0'


def launch(shape):
    """Launch both passes."""
    dtype, dims, large, channels_last = shape
    sizes = (2, 16, dims, 50, 84, 3 if large == 5 else 5, large)
    tensors = inputs(getattr(torch, dtype), sizes, LAST if channels_last else FIRST)
    backend.backward(*backend.forward(tensors), tensors)


# dtype, channels of a group, large kernel, whether channels are last: each of the network's, alternating the format.
SHAPES = [
    (dtype, dims, large, (dims + large) % 4 == 1)
    for dtype in ('bfloat16', 'float32')
    for dims in (10, 8, 14, 16)
    for large in (13, 7, 5)
]
FAST_SHAPES = [shape for shape in SHAPES if shape[:3] in (('bfloat16', 10, 13), ('bfloat16', 16, 5))]


NAMES = {'bias_table', 'forward', 'query_grad', 'tap_grad', 'value_grad'}


@needs_triton
@pytest.mark.parametrize(
    'shapes',
    [
        FAST_SHAPES,
        *(
            pytest.param([s for s in SHAPES if s[0] == dtype and s not in FAST_SHAPES], marks=pytest.mark.slow)
            for dtype in ('bfloat16', 'float32')
        ),
    ],
    ids=['two in bfloat16', 'others in bfloat16', 'float32'],
)
def test_kernels_compile_for_a_gpu_and_keep_to_its_registers(shapes, tmp_path):
    assert_compiles(__name__, 90, shapes, NAMES, str(tmp_path))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize('capability', [80, 86, 89, None], ids=lambda capability: str(capability or 'newest'))
def test_kernels_compile_for_other_gpus(capability, tmp_path):
    shapes = [('bfloat16', 10, 13, False), ('float16', 16, 7, False), ('float32', 16, 5, True)]
    assert_compiles(__name__, capability or newest(), shapes, NAMES, str(tmp_path))
