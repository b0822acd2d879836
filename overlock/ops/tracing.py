"""Checks for whether a graph is being made of the operations that run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_keeping = False


@contextmanager
def keep_operators() -> Iterator[None]:
    """Keep our operators in graphs that are traced inside: those that are read here, and used nowhere else."""
    global _keeping
    before, _keeping = _keeping, True
    try:
        yield
    finally:
        _keeping = before


def is_exporting() -> bool:
    """Return whether a graph is being made for use elsewhere: by `torch.export`, for ONNX or by `torch.jit.trace`."""
    if _keeping:
        return False
    # torch 2.6 has no is_exporting(); later ones also return True for it while torch.compile traces.
    exporting = getattr(torch.compiler, 'is_exporting', bool)() and not torch.compiler.is_dynamo_compiling()
    return exporting or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()


def is_eager() -> bool:
    """Return whether operations run as they are called, and no graph is made of them."""
    return not torch.compiler.is_compiling() and not is_exporting()


def is_unwatched() -> bool:
    """Return whether operations run as they are called, and no trace or dispatch mode reads, counts or fakes them."""
    return is_eager() and not torch.jit.is_tracing() and _get_current_dispatch_mode() is None


def is_free(*lengths: int) -> bool:
    """Return whether a graph is being made for use elsewhere in which one of these lengths is not a constant."""
    return is_exporting() and any(isinstance(length, torch.SymInt) for length in lengths)
