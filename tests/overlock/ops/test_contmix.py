"""Every backend of ContMix gives what the reference gives, forward and backward."""

from types import SimpleNamespace

import pytest
import torch

from overlock.ops import contmix, explain
from overlock.ops.contmix import cpp, eager, natten, triton
from overlock.ops.contmix.dispatch import choose
from overlock.ops.contmix.inputs import Inputs
from tests.testing import TOLERANCES, assert_relative, check_operator

# (height, width, K): odd, non-square, just large enough, and near and far of the dense product's limit.
MAPS = [
    (13, 13, 13),
    (14, 14, 13),
    (13, 29, 13),
    (21, 17, 13),
    (7, 7, 7),
    (7, 8, 7),
    (12, 9, 7),
    (5, 5, 5),
    (6, 11, 5),
    (3, 3, 3),
    (4, 7, 3),
]


def here(name: str):
    """A backend as a test parameter, skipped with the reason where it cannot run."""
    reason = explain()[name]
    return pytest.param(name, marks=pytest.mark.skipif(reason != 'available', reason=f'{name}: {reason}'))


FUSED = ['eager', here('cpp')]
BACKENDS = [*FUSED, here('natten')]


def inputs(height, width, kernel_size, small=3, groups=2, dims=3, batch=2, regions=7, dtype=torch.float64):
    generator = torch.Generator().manual_seed(height * 1000 + width)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    half = groups * dims
    taps = small**2 + kernel_size**2
    tensors = (
        randn(batch, half, height, width),
        randn(batch, half, regions, regions),
        randn(batch, 2 * half, height, width),
        randn(taps, regions**2),
        randn(taps),
        randn(groups, 2 * small - 1, 2 * small - 1),
        randn(groups, 2 * kernel_size - 1, 2 * kernel_size - 1),
    )
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
@pytest.mark.parametrize('backend', ['reference', *BACKENDS])
def test_gradients_are_those_of_finite_differences(backend, size):
    tensors, options = inputs(*size, groups=1, dims=1, batch=1, regions=2)
    assert torch.autograd.gradcheck(lambda *t: contmix(*t, **options, backend=backend), tensors)


@pytest.mark.parametrize('length', [7, 8, 20])
def test_border_queries_share_the_window_that_moved_inward(length):
    # One-hot weights on a single tap: each query then shows the pixel that this tap of its window sees.
    kernel_size = 7
    value = torch.arange(length * length, dtype=torch.float64).view(1, 1, 1, length, length)
    for tap_row, tap_col in ((0, 0), (3, 6), (6, 6)):
        weights = torch.zeros(1, 1, kernel_size**2, length, length, dtype=torch.float64)
        weights[:, :, tap_row * kernel_size + tap_col] = 1
        seen = eager.aggregate(weights, value)[0, 0, 0]
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
@pytest.mark.parametrize('backend', BACKENDS)
def test_narrow_dtypes_stay_near_the_reference_and_keep_their_dtype(backend, size, dtype):
    tensors, options = inputs(*size, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = contmix(*exact, **options, backend='reference')
    actual = contmix(*tensors, **options, backend=backend)
    assert actual.dtype == dtype
    assert_relative(actual.detach(), expected.detach(), TOLERANCES[dtype])
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = (torch.autograd.grad(out, t, grad.to(out.dtype)) for out, t in ((actual, tensors), (expected, exact)))
    for ours, truth in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        assert_relative(ours, truth, TOLERANCES[dtype])


@pytest.mark.parametrize('backend', FUSED)
def test_large_logits_do_not_overflow_in_float16(backend):
    tensors, options = inputs(14, 14, 13, dtype=torch.float16)
    query = (tensors[0].detach() * 40,)
    assert contmix(*query, *tensors[1:], **options, backend=backend).isfinite().all()


@pytest.mark.parametrize('dims', [8, 10, 16, 20])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('backend', FUSED)
def test_any_width_of_groups_and_memory_format_gives_the_reference(backend, memory_format, dims):
    tensors, options = inputs(9, 20, 7, dims=dims, small=5)
    tensors = [t.detach().contiguous(memory_format=memory_format) if t.ndim == 4 else t.detach() for t in tensors]
    tensors = [t.requires_grad_() for t in tensors]
    expected = contmix(*tensors, **options, backend='reference')
    actual = contmix(*tensors, **options, backend=backend)
    assert actual.is_contiguous(memory_format=memory_format)
    assert_relative(actual.detach(), expected.detach(), TOLERANCES[torch.float64])
    gradients = (torch.autograd.grad(out.square().sum(), tensors) for out in (actual, expected))
    for ours, truth in zip(*gradients, strict=True):
        assert_relative(ours, truth, TOLERANCES[torch.float64])


def sliced(tensor):
    """A view of every other element of a larger tensor, whose other elements are NaN."""
    larger = tensor.new_full([2 * length for length in tensor.shape], float('nan'))
    view = larger[(slice(None, None, 2),) * tensor.ndim]
    return view.copy_(tensor)


LAYOUTS = {
    'contiguous': lambda t: t.contiguous(),
    'channels_last': lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t,
    'expanded': lambda t: t[..., :1].expand(t.shape),
    'sliced': sliced,
    'transposed': lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.flip(0),
}


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize('dims', [1, 2])
@pytest.mark.parametrize('backend', BACKENDS)
def test_strides_of_any_input_and_of_the_gradient_do_not_change_the_gradients(backend, dims, layout):
    plain, options = inputs(8, 9, 5, dims=dims, groups=3, batch=2)
    plain = [t.detach() for t in plain]
    grad = torch.randn(plain[2].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for changed in (*([i] for i in range(8)), range(8)):
        tensors = [layout(t) if i in changed else t for i, t in enumerate((*plain, grad))]
        *tensors, incoming = (t.requires_grad_() for t in tensors)
        outs = [contmix(*tensors, **options, backend=name) for name in (backend, 'reference')]
        assert_relative(outs[0].detach(), outs[1].detach(), TOLERANCES[torch.float64])
        gradients = (torch.autograd.grad(out, tensors, incoming.detach()) for out in outs)
        for ours, truth in zip(*gradients, strict=True):
            assert_relative(ours, truth, TOLERANCES[torch.float64])


@pytest.fixture
def cpp_calls(monkeypatch):
    """The arguments of both C++ operators, as `cpp` calls them once."""
    calls = {}

    class Recorder:
        def __getattr__(self, name):
            return lambda *args: calls.setdefault(name, args) and getattr(operators, name)(*args)

    operators = torch.ops.overlock_cpu
    monkeypatch.setattr(torch.ops, 'overlock_cpu', Recorder())
    tensors, options = inputs(8, 9, 5)
    contmix(*tensors, **options, backend='cpp').sum().backward()
    monkeypatch.undo()
    return calls


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (sliced, 'contmix: .* must be contiguous'),
        (lambda t: t.float(), 'contmix: .* must have dtype'),
        (lambda t: t[..., :-1].contiguous(), 'contmix: .* must have shape'),
        (lambda t: t[:-1].contiguous(), 'contmix: .* must have shape'),
        (lambda t: t.unsqueeze(0), 'contmix: .* (must have|must be .*, got) shape'),
    ],
    ids=['strides', 'dtype', 'last axis', 'first axis', 'axes'],
)
@pytest.mark.skipif(explain()['cpp'] != 'available', reason='cpp: ' + explain()['cpp'])
def test_cpp_operator_refuses_what_is_not_laid_out_as_it_reads(cpp_calls, change, message):
    assert set(cpp_calls) == {'contmix_forward', 'contmix_backward'}
    for name, args in cpp_calls.items():
        operator = getattr(torch.ops.overlock_cpu, name)
        operator(*args)
        for i, tensor in enumerate(args):
            with pytest.raises(RuntimeError, match=message):
                operator(*args[:i], change(tensor), *args[i + 1 :])


@pytest.mark.parametrize('backend', FUSED)
def test_backward_pass_keeps_no_tap_weights(backend):
    tensors, options = inputs(24, 24, 13)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        contmix(*tensors, **options, backend=backend)
    # The weights of the large kernel alone are 169 maps of two groups, and the largest map kept is the value.
    assert max(kept) == tensors[2].numel()


@pytest.mark.parametrize('backend', FUSED)
def test_gradients_of_some_inputs_alone_are_the_same(backend):
    tensors, options = inputs(8, 9, 7)
    truth = torch.autograd.grad(contmix(*tensors, **options, backend=backend).square().sum(), tensors)
    for i, tensor in enumerate(tensors):
        alone = [t if t is tensor else t.detach() for t in tensors]
        (grad,) = torch.autograd.grad(contmix(*alone, **options, backend=backend).square().sum(), tensor)
        assert torch.equal(grad, truth[i])


@pytest.mark.parametrize('backend', FUSED)
def test_result_is_deterministic(backend):
    tensors, options = inputs(20, 24, 13, dtype=torch.float32)

    def run():
        out = contmix(*tensors, **options, backend=backend)
        return out, *torch.autograd.grad(out.square().sum(), tensors)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize('backend', FUSED)
def test_empty_batch_gives_an_empty_map_and_gradients(backend):
    tensors, options = inputs(8, 9, 7, batch=0)
    out = contmix(*tensors, **options, backend=backend)
    assert out.shape == (0, 12, 8, 9)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert all(grad.shape == t.shape and not grad.any() for grad, t in zip(gradients, tensors, strict=True))


@pytest.mark.parametrize('backend', FUSED)
def test_infinite_value_reaches_no_query_that_does_not_see_it(backend):
    tensors, options = inputs(20, 24, 7)
    with torch.no_grad():
        tensors[2][:, :, 3, 4] = float('inf')
    (grad,) = torch.autograd.grad(contmix(*tensors, **options, backend=backend)[..., 12:].sum(), tensors[0])
    # Windows of 7 x 7 around column 12 begin at column 9.
    assert grad[..., 12:].isfinite().all()


def projected(height, width, kernel_size, dtype=torch.float64, memory_format=torch.contiguous_format):
    """What the operators take: the regions already projected to taps."""
    tensors, options = inputs(height, width, kernel_size, dtype=dtype)
    tensors = [t.detach().contiguous(memory_format=memory_format) if t.ndim == 4 else t.detach() for t in tensors]
    return [t.requires_grad_() for t in Inputs(*tensors, **options).project()]


# The names of the registered operators stay when a backend is renamed.
REGISTERED = {'eager': 'contmix_eager', 'cpp': 'contmix_compiled', 'triton': 'contmix_triton'}


@pytest.mark.parametrize(
    ('dtype', 'memory_format'),
    [(torch.float64, torch.contiguous_format), (torch.float32, torch.channels_last)],
    ids=str,
)
@pytest.mark.parametrize('backend', FUSED)
def test_operator_keeps_the_rules_of_torch_library(backend, dtype, memory_format):
    args = projected(8, 9, 5, dtype=dtype, memory_format=memory_format)
    operator = getattr(torch.ops.overlock, REGISTERED[backend])
    check_operator(operator.default, args)
    out, lse = (t.detach() for t in operator(*args))
    grad_args = [torch.randn_like(out), torch.zeros_like(lse), *(t.detach() for t in args)]
    check_operator(getattr(torch.ops.overlock, f'{REGISTERED[backend]}_backward').default, grad_args)


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['auto', *FUSED])
def test_compiled_graph_is_whole_and_one_for_every_size(backend):
    torch._dynamo.reset()
    _, options = inputs(14, 20, 7)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(str(graph.graph))
        return torch._dynamo.lookup_backend('aot_eager')(graph, example_inputs)

    @torch.compile(fullgraph=True, dynamic=True, backend=keep)
    def run(*tensors):
        return contmix(*tensors, **options, backend=backend)

    for size in ((14, 20, 7), (15, 9, 7), (30, 31, 7)):
        tensors, _ = inputs(*size)
        out, truth = run(*tensors), contmix(*tensors, **options, backend='reference')
        assert_relative(out.detach(), truth.detach(), TOLERANCES[torch.float64])
        gradients = (torch.autograd.grad(o.square().sum(), tensors) for o in (out, truth))
        for ours, expected in zip(*gradients, strict=True):
            assert_relative(ours, expected, TOLERANCES[torch.float64])
    assert len(graphs) == 1
    ran = choose(Inputs(*tensors, **options)) if backend == 'auto' else backend
    assert f'overlock.{REGISTERED[ran]}' in graphs[0]


@pytest.mark.slow
def test_exported_program_needs_no_operator_of_ours_and_takes_other_sizes():
    class Mix(torch.nn.Module):
        def forward(self, *tensors):
            return contmix(*tensors, **options)

    tensors, options = inputs(14, 20, 7)
    height, width = (torch.export.Dim(name, min=7, max=64) for name in ('height', 'width'))
    free = {2: height, 3: width}
    program = torch.export.export(
        Mix(), tuple(t.detach() for t in tensors), dynamic_shapes=((free, None, free, None, None, None, None),)
    )
    assert 'overlock' not in str(program.graph)
    for size in ((14, 20, 7), (7, 33, 7), (13, 8, 7)):
        other, _ = inputs(*size)
        other = [t.detach() for t in other]
        expected = contmix(*other, **options, backend='reference')
        assert_relative(program.module()(*other), expected, TOLERANCES[torch.float64])


def test_auto_takes_the_fused_backend_of_the_device_where_it_can_run(monkeypatch):
    def chosen(value, large=13):
        return choose(Inputs(*[value] * 7, kernel_sizes=(5, large), num_groups=1, scale=1))

    for module in (cpp, triton):
        monkeypatch.setattr(module, 'why_unavailable', lambda: '')
    value = torch.zeros(1, 8, 20, 20)
    assert chosen(value) == 'cpp'
    assert chosen(value, 17) == 'eager'
    assert chosen(value.to('meta')) == 'eager'
    on_gpu = SimpleNamespace(device=torch.device('cuda'), dtype=torch.bfloat16)
    assert chosen(on_gpu) == 'triton'
    on_gpu.dtype = torch.float64
    assert chosen(on_gpu) == 'eager'
    monkeypatch.setattr(cpp, 'why_unavailable', lambda: 'not compiled')
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert chosen(value) == 'eager'


@pytest.mark.skipif(explain()['cpp'] != 'available', reason='cpp: ' + explain()['cpp'])
def test_former_name_of_the_cpp_backend_still_runs_it():
    tensors, options = inputs(8, 8, 5)
    assert torch.equal(*(contmix(*tensors, **options, backend=name) for name in ('compiled', 'cpp')))


def test_auto_runs_without_options_and_explain_names_every_backend():
    tensors, options = inputs(8, 8, 5)
    assert_relative(
        contmix(*tensors, **options).detach(),
        contmix(*tensors, **options, backend='reference').detach(),
        TOLERANCES[torch.float64],
    )
    reasons = explain()
    assert reasons['reference'] == reasons['eager'] == 'available'
    assert set(reasons) == {'reference', 'eager', 'cpp', 'triton', 'natten'}


def test_unknown_backend_names_the_known_ones():
    tensors, options = inputs(8, 8, 5)
    with pytest.raises(ValueError, match="'auto' or one of reference, eager, cpp, triton, natten, got 'cuda'"):
        contmix(*tensors, **options, backend='cuda')


def test_backend_that_cannot_run_raises_with_the_reason(monkeypatch):
    monkeypatch.setattr(natten, 'why_unavailable', lambda: 'natten is not installed')
    tensors, options = inputs(8, 8, 5)
    with pytest.raises(RuntimeError, match="'natten' was asked for but cannot run here: natten is not installed"):
        contmix(*tensors, **options, backend='natten')


@pytest.mark.parametrize(
    ('backend', 'device', 'kernel_size', 'message'),
    [
        ('cpp', 'meta', 5, 'it runs on the CPU and the maps are on meta'),
        ('cpp', 'cpu', 17, r'it has kernels of 3, .*, 15 and kernel_sizes are \(3, 17\)'),
        ('triton', 'cpu', 5, 'it runs on CUDA devices and the maps are on cpu'),
    ],
)
def test_backend_that_cannot_take_the_inputs_says_why(backend, device, kernel_size, message, monkeypatch):
    for module in (cpp, triton):
        monkeypatch.setattr(module, 'why_unavailable', lambda: '')
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    tensors, options = inputs(20, 20, kernel_size)
    with pytest.raises(RuntimeError, match=f'{backend!r} was asked for but cannot take these inputs: {message}'):
        contmix(*(t.detach().to(device) for t in tensors), **options, backend=backend)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(kernel_sizes=(3, 9)), 'at least 9 pixels high and wide, got 8x8'),
        (dict(kernel_sizes=(3, 4)), r'must be odd, got \(3, 4\)'),
        (dict(num_groups=5), 'multiple of 2 x 5 groups'),
        (dict(kernel_sizes=(5, 5)), r'weight must have shape \(50, 49\), got \(34, 49\)'),
        (dict(num_groups=3), r'rpb must have shape \(3, 5, 5\), got \(2, 5, 5\)'),
    ],
)
def test_wrong_shapes_are_one_clear_sentence(change, message):
    tensors, options = inputs(8, 8, 5)
    with pytest.raises(ValueError, match=message):
        contmix(*tensors, **{**options, **change})
