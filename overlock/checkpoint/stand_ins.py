"""Stand-ins for what files of trainers hold beside tensors: NumPy's numbers and the logs of mmengine."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

from overlock.utils.errors import CheckpointError

RUNS_CODE = (
    ', which a checkpoint could use to run code, and was not loaded; save it again with tensors, numbers and strings '
    'only.'
)
TOO_LARGE = ', and was not loaded: it is damaged, or crafted to exhaust memory; get it again from where you trust.'

SCALARS = (str, int, float, bool, bytes, type(None))


def shown(value: object) -> str:
    """Return a name of the file for a message; it may be anything."""
    text = str(value) if isinstance(value, SCALARS) else f'a {type(value).__name__}'
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 100 else f'{text[:100]}...'


class Dtype:
    """Stand-in for `numpy.dtype`, which takes numbers only and ignores all state but the byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def fill(self, state: tuple[Any, ...]) -> None:
        import numpy as np

        code = f'{state[1]}{self.code}'
        if not re.fullmatch('[<>|=]?[biufc][0-9]+', code):
            raise CheckpointError(f'holds NumPy values of type {shown(code)}{RUNS_CODE}')
        self.value = np.dtype(code)


class Array:
    """Stand-in for `numpy.ndarray`, whose own constructor and state can point at memory outside the file."""

    def __init__(self, spend: Callable[[int], None]) -> None:
        self.spend = spend

    def fill(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.spend(len(data))
        self.value = _numbers(dtype, data, shape, 'F' if fortran else 'C')


class LoggedValues:
    """Stand-in for mmengine's HistoryBuffer, which takes its numbers and not its functions.

    Attributes:
        arguments: Values, counts and the maximum length, as HistoryBuffer takes them.
    """

    def fill(self, state: dict[str, Any]) -> None:
        self.arguments = state['_log_history'].value, state['_count_history'].value, state['max_length']


def _numbers(dtype: Dtype, data: bytes, shape: tuple[int, ...] = (), order: Any = 'C') -> Any:
    """Return a NumPy array of checked bytes."""
    import numpy as np

    sizes_fit = all(type(size) is int and size >= 0 for size in shape)
    if not sizes_fit or type(data) is not bytes or len(data) != dtype.value.itemsize * math.prod(shape):
        raise CheckpointError(f'holds a NumPy array whose bytes do not fill its shape {shown(str(shape))}{RUNS_CODE}')
    return np.frombuffer(data, dtype.value).reshape(shape, order=order).copy('K')


def scalar(dtype: Dtype, data: bytes) -> Any:
    return _numbers(dtype, data)[()]


def method_name(owner: object, name: str) -> str:
    """Answer a saved HistoryBuffer, which names its functions by `getattr`."""
    if getattr(owner, 'run', None) is not LoggedValues:
        raise CheckpointError(f'asks for the Python object builtins.getattr{RUNS_CODE}')
    return name


def restored(value: Any, done: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """Return what was unpickled, with NumPy's own arrays in place of their stand-ins; containers change in place."""
    done = {} if done is None else done
    if isinstance(value, (Array, Dtype)):
        return value.value
    if id(value) in done:
        return done[id(value)][1]
    # Keep the old value as well, so that no other object takes its id.
    done[id(value)] = value, value
    if isinstance(value, (dict, list)):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = restored(item, done)
    elif isinstance(value, argparse.Namespace):
        restored(vars(value), done)
    elif type(value) is tuple:
        done[id(value)] = value, tuple(restored(item, done) for item in value)
    return done[id(value)][1]
