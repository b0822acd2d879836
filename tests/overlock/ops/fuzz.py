"""Cases for operators: tensors of any strides between guards, and how far a result may be from the truth."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
LAYOUTS = ('contiguous', 'channels_last', 'expanded', 'sliced', 'transposed')
# Elements in front of a tensor and behind it: more than a cache line and than any vector that is read past an end.
GUARD = 64


def fuzz(count: int) -> Callable:
    """Run a test on this many cases, the same at every call."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


class Guarded(NamedTuple):
    """A tensor inside a larger buffer, all else of which is NaN with a payload."""

    tensor: Tensor
    buffer: Tensor
    before: Tensor

    def is_untouched(self) -> bool:
        return torch.equal(self.buffer.view(BITS[self.buffer.itemsize]), self.before)


def lay_out(values: Tensor, layout: str) -> Guarded:
    """Copy values to a guarded tensor of other strides; 'expanded' repeats the first of each last axis."""
    shape, order = list(values.shape), list(range(values.ndim))
    if layout == 'channels_last' and values.ndim == 4:
        order = [0, 2, 3, 1]
    elif layout == 'transposed' and values.ndim > 1:
        order = [*order[:-2], order[-1], order[-2]]
    step = 2 if layout == 'sliced' else 1
    if layout == 'expanded' and values.ndim > 1:
        shape[-1] = min(shape[-1], 1)
    strides = [0] * values.ndim
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis] * (2 if layout == 'sliced' else 1)
    buffer = torch.empty(step + 2 * GUARD, dtype=values.dtype)
    buffer.fill_(torch.nan).view(BITS[buffer.itemsize]).add_(1)
    view = buffer.as_strided(shape, strides, GUARD)
    view.copy_(values[..., : shape[-1]] if shape else values)
    return Guarded(view.expand(values.shape), buffer, buffer.view(BITS[buffer.itemsize]).clone())


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(*(t.contiguous().view(BITS[t.itemsize]) for t in (first, second)))


class Case(NamedTuple):
    seed: int
    dtype: torch.dtype
    layouts: tuple[str, ...]  # of each tensor
    special: tuple[int, float] | None  # a tensor that gets one element that is not finite

    def spoil(self, index: int, values: Tensor) -> Tensor:
        """Put the special value into one element of its tensor."""
        if self.special is not None and self.special[0] == index and values.numel():
            place = self.seed % values.numel()
            values.view(-1)[place] = self.special[1]
            if math.isnan(self.special[1]):
                # With a payload: its bits are no round number.
                values.view(-1).view(BITS[values.itemsize])[place] += 1
        return values


def cases(tensors: int) -> st.SearchStrategy[Case]:
    """Draw how to fill and to lay out a number of tensors."""
    special = st.tuples(st.integers(0, tensors - 1), st.sampled_from((math.nan, math.inf, -math.inf)))
    layouts = st.tuples(*[st.sampled_from(LAYOUTS)] * tensors)
    return st.builds(
        Case,
        st.integers(0, 2**32),
        st.sampled_from(DTYPES),
        layouts,
        st.one_of(st.none(), st.none(), st.none(), special),
    )


def error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest deviation."""
    return (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
