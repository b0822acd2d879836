"""'auto' takes a fused backend only where it agrees with the reference."""

import logging
import threading
import time

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from overlock.ops import contmix, explain, proof
from overlock.ops.contmix import cpp
from overlock.ops.contmix import proof as contmix_proof
from overlock.ops.contmix.dispatch import BACKENDS
from overlock.ops.contmix.inputs import Inputs
from overlock.ops.contmix.proof import deviation, make_inputs
from overlock.ops.proof import LIMITS

pytestmark = pytest.mark.skipif(explain()['cpp'] != 'available', reason='cpp: ' + explain()['cpp'])


@pytest.fixture(autouse=True)
def unproved(monkeypatch):
    """A process that has used no backend yet."""
    monkeypatch.setattr(proof, '_proofs', {})


@pytest.fixture
def ran(monkeypatch):
    """The backends that ran in the caller's thread, by name."""
    names, caller = [], threading.get_ident()
    for name in ('cpp', 'eager'):

        def run(inputs, name=name, run=BACKENDS[name].run):
            if threading.get_ident() == caller:
                names.append(name)
            return run(inputs)

        monkeypatch.setattr(BACKENDS[name], 'run', run)
    return names


class Halved(torch.autograd.Function):
    """The identity, with a gradient that is wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


WRONG = {
    'output': lambda out: out * 1.001,
    'gradient': Halved.apply,
    'nan': lambda out: out * float('nan'),
    'error': lambda out: out.no_such_thing,
}


@pytest.fixture(params=WRONG)
def wrong(request, monkeypatch, ran):
    monkeypatch.setattr(cpp, 'run', lambda inputs, run=cpp.run: WRONG[request.param](run(inputs)))
    return request.param


def call(dtype=torch.float32, grad=True, **more):
    tensors, options = make_inputs('cpu', dtype)
    with torch.autocast('cpu', dtype, enabled=dtype.itemsize == 2):
        return contmix(*(tensor.requires_grad_(grad) for tensor in tensors), **options, **more)


def test_a_wrong_backend_is_told_once_and_eager_runs(wrong, ran, caplog):
    with caplog.at_level(logging.WARNING):
        out = call()
        call()
    assert ran == ['eager', 'eager'] and torch.equal(out, call(backend='eager'))
    (record,) = caplog.records
    assert record.getMessage().startswith('The ContMix backend cpp on cpu in float32 ')
    assert record.getMessage().endswith(': the slower eager one runs instead; `overlock doctor` tells more.')


@pytest.mark.parametrize('wrong', ['gradient'], indirect=True)
def test_inference_needs_no_gradients_to_be_right(wrong, ran):
    call(grad=False)
    with torch.no_grad():
        call()
    assert ran == ['cpp', 'cpp']


def test_a_coarser_matrix_product_makes_no_backend_wrong(ran, monkeypatch):
    def project(inputs, project=Inputs.project):
        x = project(inputs)
        return x._replace(kernel=x.kernel.to(torch.bfloat16).to(x.kernel.dtype))

    monkeypatch.setattr(Inputs, 'project', project)
    assert deviation('cpp', 'cpu') > LIMITS[torch.float32]
    ran.clear()
    call()
    assert ran == ['cpp']


@pytest.mark.parametrize('wrong', ['output'], indirect=True)
def test_a_backend_asked_for_by_name_is_not_checked(wrong, ran):
    call(backend='cpp')
    assert ran == ['cpp'] and not proof._proofs


@pytest.mark.parametrize('dtype', LIMITS, ids=str)
def test_the_right_one_is_proved_once_for_each_dtype_in_milliseconds(dtype, ran, monkeypatch):
    calls = []
    monkeypatch.setattr(contmix_proof, 'deviation', lambda *a, f=deviation, **k: calls.append(a) or f(*a, **k))
    call(dtype, grad=False)
    # Of processor time, whatever else the machine does.
    start = time.process_time()
    call(dtype, grad=False)
    again = time.process_time() - start
    start = time.process_time()
    call(dtype)
    assert time.process_time() - start - again < 0.5
    call(dtype)
    assert ran == ['cpp'] * 4 and len(calls) == 2


def test_the_check_leaves_no_trace_in_the_callers_state():
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        call(grad=False)
        assert torch.is_inference_mode_enabled() and torch.get_autocast_dtype('cpu') == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize('wrong', ['output'], indirect=True)
def test_fake_tensors_get_the_answer_of_real_ones(wrong, ran):
    tensors, options = make_inputs('cpu')
    with FakeTensorMode() as mode:
        contmix(*map(mode.from_tensor, tensors), **options)
    assert ran == ['eager']


def test_graphs_get_the_answer_of_real_calls(monkeypatch):
    monkeypatch.setattr(cpp, 'run', lambda inputs, run=cpp.run: run(inputs) * 1.001)
    tensors, options = make_inputs('cpu')
    torch._dynamo.reset()
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(str(graph.graph))
        return graph

    torch.compile(lambda *t: contmix(*t, **options), fullgraph=True, dynamic=True, backend=keep)(*tensors)
    assert 'contmix_eager' in graphs[0]
    assert proof._proofs.keys() == {('ContMix', 'cpp', torch.device('cpu'), torch.float32, False)}


def test_nothing_is_proved_in_a_backward_pass(ran):
    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            call()
            return grad

    Again.apply(torch.zeros(1, requires_grad=True)).sum().backward()
    assert ran == ['cpp'] and not proof._proofs


def test_threads_prove_it_once(monkeypatch):
    calls = []
    monkeypatch.setattr(contmix_proof, 'deviation', lambda *a, f=deviation, **k: calls.append(a) or f(*a, **k))
    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
