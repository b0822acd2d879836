"""The C++ operators read and write inside their tensors alone: AddressSanitizer watches the memory around each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from overlock.ops import build, explain
from tests.testing import ROOT

# Runs in a process whose memory comes from the sanitizer.
SCRIPT = """
import ctypes, sys
import torch
from hypothesis import given
from hypothesis import strategies as st

import overlock.ops.dilated
from overlock.ops import build
from overlock.ops.feed_forward import feed_forward

torch.ops.load_library(sys.argv[1])
build.load = lambda: ''

from tests.overlock.ops.fuzz import cases, fuzz
from tests.overlock.ops.test_fuzz import check_mix, mixes

poisoned = ctypes.CDLL(None).__asan_address_is_poisoned
poisoned.argtypes = [ctypes.c_void_p]
tensor = torch.empty(24)
assert not poisoned(tensor.data_ptr() + 95) and poisoned(tensor.data_ptr() + 96)

done = []

@given(cases(8), mixes())
@fuzz({count})
def run(case, drawn):
    check_mix(case, *drawn, ['cpp'])
    done.append(case)

@given(st.tuples(*[st.integers(1, n) for n in (3, 40, 20, 20)]), st.sampled_from([torch.float32, torch.float64]))
@fuzz({count})
def run_depthwise(size, dtype):
    x, grad = (torch.randn(size, dtype=dtype) for _ in range(2))
    count = 1 + size[2] % 3
    weights = [torch.randn(size[1], 1, k, k, dtype=dtype) for k in (7, 3, 1)[:count]]
    operators, dilations = torch.ops.overlock, [1, 2, 3][:count]
    kept, mean, _ = operators.dilated_moments(x, weights, dilations)
    operators.dilated_weighted_sum(x, kept, weights, dilations, torch.randn(count + 1, size[1]))
    operators.dilated_products(x, grad, kept, weights, dilations, mean[0], mean[0, 0])
    operators.dilated_backward(x, grad, kept, weights, dilations, torch.randn(3, count, size[1]))
    operators.depthwise_weight_gradient(x, grad, 5, 2)
    b, c, h, w = size
    shapes = [(c, 1, 3, 3), (c,), (1, c, 1, 1), (1, c, 1, 1), (2, c, 1, 1), (2,)]
    out = feed_forward(x.requires_grad_(), *(torch.randn(shape, dtype=dtype) for shape in shapes))
    torch.autograd.grad(out.sum(), x)
    done.append(size)

run()
run_depthwise()
print(len(done))
"""


@pytest.mark.slow
@pytest.mark.skipif(explain()['cpp'] != 'available', reason='cpp: ' + explain()['cpp'])
def test_cpp_operators_stay_inside_their_tensors(tmp_path):
    from torch.utils import cpp_extension

    compiler, library = os.environ.get('CXX', 'g++'), tmp_path / 'sanitized.so'
    flags = [*build.compiler_flags(), '-O1', '-g', '-fsanitize=address', '-fPIC', '-shared', '-std=c++17']
    includes = [f'-I{path}' for path in cpp_extension.include_paths()]
    libraries = [f'-L{Path(torch.__file__).parent / "lib"}', '-ltorch_cpu', '-lc10']
    sources = [str(path) for path in build.SOURCES]
    subprocess.run([compiler, *flags, *includes, *sources, '-o', str(library), *libraries], check=True)
    # Both have to come first: the sanitizer takes over the allocator, and the exceptions of the C++ library.
    first = [
        subprocess.run(
            [compiler, f'-print-file-name={name}'], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ('libasan.so', 'libstdc++.so')
    ]
    environ = os.environ | dict(LD_PRELOAD=' '.join(first), ASAN_OPTIONS='detect_leaks=0')
    result = subprocess.run(
        [sys.executable, '-c', SCRIPT.format(count=150), str(library)],
        env=environ,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    assert int(result.stdout) >= 300
