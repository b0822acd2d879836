"""Prove on this machine, at first use, that a backend of an operator agrees with the reference."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Largest deviations, relative to the largest magnitude of the output and of each gradient.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

_logger = logging.getLogger(__name__)
_lock = threading.Lock()


class Claim(NamedTuple):
    """What a proof is of: a backend of an operator for maps of a device and a dtype, with or without gradients."""

    operator: str
    backend: str
    device: torch.device
    dtype: torch.dtype
    backward: bool


_proofs: dict[Claim, bool] = {}


def largest_deviation(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest deviation of tensors, each relative to its largest magnitude; NaN if one is NaN."""
    deviations = [(a.double().cpu() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
    # torch's maximum of a NaN is NaN, which is below no limit.
    return float(torch.stack(deviations).max())


def probe(out: Tensor) -> Tensor:
    """Return a gradient for an output: neither that of a sum nor of a mean, which are the same at each pixel."""
    return torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out)


def is_right(claim: Claim, deviation: Callable[[str], float]) -> bool:
    """Return whether a backend is within `LIMITS` of the reference: by a call of it, once a process for each claim.

    What is wrong is told by a warning. In a backward pass and while a CUDA graph is captured nothing can be proved: the
    answer is then True, and the next call proves it.

    Args:
        claim: What to prove.
        deviation: Returns the largest deviation of a backend, or of 'eager'.
    """
    if claim in _proofs:
        return _proofs[claim]
    # Before the lock: what proves may need the thread that waits here.
    busy = torch._C._current_graph_task_id() != -1
    if busy or claim.device.type == 'cuda' and torch.cuda.is_current_stream_capturing():
        return True
    with _lock:
        if claim not in _proofs:
            _proofs[claim] = _prove(claim, deviation)
        return _proofs[claim]


def _prove(claim: Claim, deviation: Callable[[str], float]) -> bool:
    told: list[str] = []

    def call() -> None:
        try:
            found, limit = deviation(claim.backend), LIMITS[claim.dtype]
            if not found <= limit:
                # TF32, where it is allowed, makes the matrix product that all of them share coarser.
                limit = max(limit, 4 * deviation('eager'))
            wrong = f'deviates from the reference by {found:.1e}, at most {limit:.0e} is right'
            told.append('' if found <= limit else wrong)
        # A compiler of kernels fails in many ways.
        except Exception as error:
            told.append(f'fails ({error})')

    # Modes of torch are a thread's own: here nothing is traced, faked, autocast or without gradients.
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    if told[0]:
        _logger.warning(
            'The %s backend %s on %s in %s %s: the slower eager one runs instead; `overlock doctor` tells more.',
            *(*claim[:3], str(claim.dtype).removeprefix('torch.'), told[0]),
        )
    return not told[0]
