"""Read pickled files without running code: tensors, plain values, NumPy numbers, and the logs of trainers."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from overlock.utils.errors import CheckpointError

# The list of globals that torch allows belongs to the process.
_LOCK = threading.RLock()


class _Dtype:
    """Stand-in for `numpy.dtype`, which takes numbers only and ignores all state but the byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        import numpy as np

        code = f'{state[1]}{self.code}'
        if not re.fullmatch('[<>|=]?[biufc][0-9]+', code):
            raise CheckpointError(f'holds NumPy values of type {code}')
        self.value = np.dtype(code)


class _Array:
    """Stand-in for `numpy.ndarray`, whose own constructor and state can point at memory outside the file."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _numbers(dtype, shape, data, fortran)


class LoggedValues:
    """Stand-in for mmengine's HistoryBuffer, which takes its numbers and not its functions.

    Attributes:
        arguments: Values, counts and the maximum length, as HistoryBuffer takes them.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.arguments = state['_log_history'].value, state['_count_history'].value, state['max_length']


def _numbers(dtype: _Dtype, shape: tuple[int, ...], data: bytes, fortran: bool = False) -> Any:
    """Return a NumPy array of checked bytes."""
    import numpy as np

    sizes_fit = all(type(size) is int and size >= 0 for size in shape)
    if not sizes_fit or type(data) is not bytes or len(data) != dtype.value.itemsize * math.prod(shape):
        raise CheckpointError(f'holds a NumPy array whose bytes do not fill its shape {shape}')
    return np.frombuffer(data, dtype.value).reshape(shape, order='F' if fortran else 'C').copy('K')


def _array(*_: object) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return _numbers(dtype, (), data)[()]


def _empty_bytes() -> bytes:
    return b''


def _method_name(owner: object, name: str) -> str:
    """Answer a saved HistoryBuffer, which names its functions by `getattr`."""
    if owner is not LoggedValues:
        raise CheckpointError('asks for the Python object builtins.getattr')
    return name


# By the names that files ask for; pickles of NumPy 1 and 2 differ in one.
_STAND_INS: dict[str, Callable[..., Any]] = {
    'argparse.Namespace': argparse.Namespace,
    'builtins.bytes': _empty_bytes,
    'builtins.getattr': _method_name,
    'mmengine.logging.history_buffer.HistoryBuffer': LoggedValues,
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Array,
    'numpy.core.multiarray._reconstruct': _array,
    'numpy._core.multiarray._reconstruct': _array,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
}


def restored(value: Any, done: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """Return what was loaded with NumPy's own arrays in place of their stand-ins; containers are changed in place."""
    done = {} if done is None else done
    if isinstance(value, (_Array, _Dtype)):
        return value.value
    if id(value) in done:
        return done[id(value)][1]
    # Entries keep the old value too, so that no other takes its id.
    done[id(value)] = value, value
    if isinstance(value, (dict, list)):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = restored(item, done)
    elif isinstance(value, argparse.Namespace):
        restored(vars(value), done)
    elif type(value) is tuple:
        done[id(value)] = value, tuple(restored(item, done) for item in value)
    return done[id(value)][1]


@contextmanager
def safely(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let `torch.load(..., weights_only=True)` take the stand-ins inside the block, and explain what it raises.

    What the block returns from `torch.load` goes through `restored`.

    Raises:
        CheckpointError: If the file is damaged, or would have to run code to load.
    """
    with _LOCK:
        allowed = torch.serialization.get_safe_globals()
        # What the user allows by itself stays allowed, but not NumPy's own functions.
        others = [entry for entry in allowed if _name(entry) not in _STAND_INS]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*others, *((target, name) for name, target in _STAND_INS.items())])
        try:
            yield
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        # A damaged or crafted file can make the unpickler raise anything.
        except Exception as error:
            raise _explained(path, error) from error
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)


def _name(entry: Any) -> str:
    return entry[1] if isinstance(entry, tuple) else f'{entry.__module__}.{entry.__qualname__}'


def _explained(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    found = re.search(r'GLOBAL (\S+)', str(error))
    reason = f'asks for the Python object {found[1]}' if found else str(error)
    if found or isinstance(error, CheckpointError):
        return CheckpointError(
            f'{path} {reason}, which a checkpoint could use to run code, and was not loaded; save it again with '
            'tensors, numbers and strings only.'
        )
    # Opcodes that protocols 4 and 5 add begin at 140.
    if re.search(r'Unsupported operand 1[4-9]\d', reason):
        return CheckpointError(
            f'{path} is pickled by a protocol that cannot be read safely, expected 2 or 3; save it '
            'again with the default protocol of torch.save.'
        )
    if isinstance(error, ImportError):
        return CheckpointError(f'{path} needs a package that is not installed ({reason}); install it with pip.')
    # torch seeks before the start of a file that is too short.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return CheckpointError(f'Cannot read the checkpoint {path} ({error}); give the path of a file on this machine.')
    return CheckpointError(
        f'{path} is not a whole PyTorch checkpoint: it was cut off while it was written, or is another kind of file.'
    )


def read_pickled(path: str | os.PathLike[str], map_location: Any = 'cpu') -> Any:
    """Return what a file of torch.save holds.

    Raises:
        CheckpointError: If it is damaged, or would have to run code to load.
    """
    with safely(path):
        return restored(torch.load(path, map_location=map_location, weights_only=True))
