"""Fixtures of the tests of operators."""

import pytest
import torch

from overlock.ops import gpu
from tests.overlock.ops.triton_testing import repair_interpreter


@pytest.fixture(scope='module')
def device():
    """A GPU that the kernels run on, or the CPU with Triton's interpreter for the time of this module."""
    with pytest.MonkeyPatch.context() as patch:
        if gpu.why_no_triton() == 'no CUDA device':
            patch.setenv('TRITON_INTERPRET', '1')
        if reason := gpu.why_no_triton():
            pytest.skip(reason)
        if gpu.interpreted():
            repair_interpreter(patch)
        yield torch.device('cpu' if gpu.interpreted() else 'cuda')


@pytest.fixture
def poisoned():
    """Memory comes filled with NaN, so that what no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(100).isnan().all() and torch.empty_like(torch.zeros(100)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
