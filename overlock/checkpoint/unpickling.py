"""Unpickling without running what a file asks for: tensors, plain values, and stand-ins for the logs of trainers."""

from __future__ import annotations

import argparse
import codecs
import errno
import functools
import os
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from overlock.utils.errors import CheckpointError

# What torch.load raises on files that are cut off, ask for code, or are something else by their first bytes.
UNREADABLE = (
    pickle.UnpicklingError,
    OSError,
    RuntimeError,
    EOFError,
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
)

# What is allowed while files are read is a setting of the whole process.
_LOCK = threading.RLock()
_FORCED = {'TORCH_FORCE_WEIGHTS_ONLY_LOAD': '1', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '0'}


def unreadable(path: str | os.PathLike, error: Exception) -> CheckpointError:
    """What to tell of a file on which `torch.load(..., weights_only=True)` raised one of `UNREADABLE`."""
    found = re.search(r'GLOBAL (\S+)', str(error))
    # What protocols 4 and 5 add begins at 140.
    newer = re.search(r'Unsupported operand 1[4-9]\d', str(error))
    wanted = found[1] if found else _foreign_global(path) if newer else None
    if wanted:
        return CheckpointError(
            f'{path} asks for the Python object {wanted}, which a checkpoint could use to run code, and was not '
            'loaded; save it again with tensors, numbers and strings only.'
        )
    if newer:
        return CheckpointError(
            f'{path} is pickled by a protocol that cannot be read safely, expected 2 or 3; save it '
            'again with the default protocol of torch.save.'
        )
    # torch seeks before the start of a file that is too short.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return CheckpointError(f'Cannot read the checkpoint {path} ({error}); give the path of a file on this machine.')
    return CheckpointError(
        f'{path} is not a whole PyTorch checkpoint: it was cut off while it was written, or is another kind of file.'
    )


def _foreign_global(path: str | os.PathLike) -> str | None:
    """The first object that a pickle of protocol 4 or 5 asks for and torch's own files do not; nothing is run."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            data = next((archive.read(name) for name in archive.namelist() if name.endswith('data.pkl')), b'')
    else:
        with open(path, 'rb') as file:
            data = file.read()
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == 'STACK_GLOBAL' and not strings[-2].startswith(('torch', 'collections')):
                return '.'.join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    except (ValueError, IndexError):
        return None
    return None


def _answers_to(path: str) -> Callable[[Any], Any]:
    """Give a class or function the name that files ask for; torch < 2.6 takes no (callable, name) pairs."""

    def rename(target: Any) -> Any:
        target.__module__, _, target.__name__ = path.rpartition('.')
        target.__qualname__ = target.__name__
        return target

    return rename


@_answers_to('mmengine.logging.history_buffer.HistoryBuffer')
class LoggedValues:
    """Takes the numbers of a saved HistoryBuffer of mmengine, and not the functions that its own class would."""

    def __setstate__(self, state: dict) -> None:
        self.arguments = state['_log_history'], state['_count_history'], state['max_length']


@_answers_to('builtins.getattr')
def _method_name(owner: object, name: str) -> str:
    """Answers a saved HistoryBuffer, which names its functions by `getattr`, and nothing else."""
    if owner is not LoggedValues:
        raise pickle.UnpicklingError('Unsupported global: GLOBAL builtins.getattr')
    return name


@functools.cache
def _safe_globals() -> list[Any]:
    """Stand-ins, timm's Namespace of options, and what arrays of numbers are pickled by in NumPy 1 and 2."""
    plain = [LoggedValues, _method_name, argparse.Namespace]
    try:
        import numpy as np
    except ImportError:  # torch itself goes without; files with arrays are then refused
        return plain
    functions = {'_reconstruct': np.ndarray(0).__reduce__()[0], 'scalar': np.float64().__reduce__()[0]}
    numbers = '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']
    return [
        *plain,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in numbers},
        # The bytes of an array; torch allows the second by itself from 2.5 on.
        bytes,
        codecs.encode,
        *(
            _answers_to(f'{package}.multiarray.{name}')(functools.partial(function))
            for name, function in functions.items()
            for package in ('numpy.core', 'numpy._core')
        ),
    ]


@contextmanager
def weights_only() -> Iterator[None]:
    """Let every `torch.load` inside take tensors, plain values and the logs of trainers, and refuse all else.

    That holds for loads that ask for everything too, as those of mmengine and torch.hub do on some versions.
    """
    with _LOCK:
        environment = {name: os.environ.get(name) for name in _FORCED}
        allowed = list(torch.serialization.get_safe_globals())
        os.environ.update(_FORCED)
        torch.serialization.add_safe_globals(_safe_globals())
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)
            for name, value in environment.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def read_pickled(path: str | os.PathLike, map_location: str = 'cpu') -> Any:
    """What a file of torch.save holds.

    Raises:
        CheckpointError: If it is damaged, or would have to run code to load.
    """
    try:
        with weights_only():
            return torch.load(path, map_location=map_location, weights_only=True)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
