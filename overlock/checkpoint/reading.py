"""Read weight files without running code: tensors, plain values, NumPy numbers, and the logs of trainers."""

from __future__ import annotations

import argparse
import errno
import math
import os
import re
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from overlock.checkpoint.download import find_file
from overlock.utils.errors import CheckpointError

# Trainers put a state dict, and its running average, under these names.
_PLAIN = ('state_dict', 'model')
_AVERAGES = ('state_dict_ema', 'model_ema')
# mmengine's EMAHook puts the average into `state_dict`, and the weights behind it here.
_BEHIND_AVERAGE = 'ema_state_dict'
# DistributedDataParallel, averaging and torch.compile put these before names.
_PREFIXES = ('module.', '_orig_mod.', 'module.')
# The list of globals that torch allows belongs to the whole process.
_LOCK = threading.RLock()


def load(source: str | os.PathLike[str], ema: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a weight file (.pth or .safetensors), on the CPU, out of their usual wrappings.

    Unwraps `state_dict`, `model`, `state_dict_ema`, `model_ema`, and the prefixes `module.` and `_orig_mod.`. In a file
    of mmengine's EMAHook `state_dict` is the average, with or without `ema`.

    Args:
        source: A name in `overlock.checkpoint.WEIGHTS`, a path, or a URL, see `find_file`.
        ema: Whether to take the running average of the weights, where the file has both.

    Raises:
        CheckpointError: If the file cannot be found, is damaged, holds no state dict, no average that was asked for,
            or would have to run code to load.
    """
    path = find_file(source)
    content: Any
    if path.suffix == '.safetensors':
        with safely(path):
            from safetensors.torch import load_file

            content = load_file(path)
    else:
        content = read_pickled(path)
    content = content if isinstance(content, Mapping) else {}
    inner = {name: value for name, value in content.items() if isinstance(value, Mapping)}
    plain, average = (next((inner[name] for name in names if name in inner), None) for names in (_PLAIN, _AVERAGES))
    if ema and average is None:
        if _BEHIND_AVERAGE not in inner:
            raise CheckpointError(
                f'{path} holds no running average of weights: expected one of '
                f'{", ".join((*_AVERAGES, _BEHIND_AVERAGE))}; load its weights themselves'
            )
        average = plain
    found = (average if ema else plain or average or content) or {}
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f'{path} holds no state dict: expected tensors by their names, bare or under one of '
            f'{", ".join(_PLAIN + _AVERAGES)}; give a file of weights'
        )
    for prefix in _PREFIXES:
        # Averaged models count their updates beside the network.
        below = {name: value for name, value in tensors.items() if '.' in name}
        if below and all(name.startswith(prefix) for name in below):
            tensors = {name.removeprefix(prefix): value for name, value in below.items()}
    return tensors


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """Return what a file of torch.save holds, on the CPU.

    Raises:
        CheckpointError: If it is damaged, or would have to run code to load.
    """
    with safely(path):
        return restored(torch.load(path, map_location='cpu', weights_only=True))


def check_whole(path: str | os.PathLike[str]) -> None:
    """Check that nothing of a weight file is missing or changed: an archive of torch.save holds a CRC of each part.

    Raises:
        CheckpointError: If the file is damaged, or cannot be read at all.
    """
    if not zipfile.is_zipfile(path):
        load(path)
        return
    with safely(path), zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise zipfile.BadZipFile


@contextmanager
def safely(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let `torch.load(..., weights_only=True)` take the stand-ins below, and explain what the block raises.

    Raises:
        CheckpointError: If the file is damaged, or would have to run code to load.
    """
    with _LOCK:
        allowed = torch.serialization.get_safe_globals()
        # The user's own entries stay, except NumPy's functions, which crafted files can misuse.
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

    def __init__(self, *_: object) -> None:
        """Take no value yet, as NumPy's `_reconstruct` does."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _numbers(dtype, data, shape, 'F' if fortran else 'C')


class LoggedValues:
    """Stand-in for mmengine's HistoryBuffer, which takes its numbers and not its functions.

    Attributes:
        arguments: Values, counts and the maximum length, as HistoryBuffer takes them.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.arguments = state['_log_history'].value, state['_count_history'].value, state['max_length']


def _numbers(dtype: _Dtype, data: bytes, shape: tuple[int, ...] = (), order: Any = 'C') -> Any:
    """Return a NumPy array of checked bytes."""
    import numpy as np

    sizes_fit = all(type(size) is int and size >= 0 for size in shape)
    if not sizes_fit or type(data) is not bytes or len(data) != dtype.value.itemsize * math.prod(shape):
        raise CheckpointError(f'holds a NumPy array whose bytes do not fill its shape {shape}')
    return np.frombuffer(data, dtype.value).reshape(shape, order=order).copy('K')


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return _numbers(dtype, data)[()]


def _method_name(owner: object, name: str) -> str:
    """Answer a saved HistoryBuffer, which names its functions by `getattr`."""
    if owner is not LoggedValues:
        raise CheckpointError('asks for the Python object builtins.getattr')
    return name


# By the names that files ask for; NumPy 1 writes `core`, NumPy 2 `_core`.
_STAND_INS: dict[str, Callable[..., Any]] = {
    'argparse.Namespace': argparse.Namespace,
    'builtins.bytes': lambda: b'',
    'builtins.getattr': _method_name,
    'mmengine.logging.history_buffer.HistoryBuffer': LoggedValues,
    'numpy.dtype': _Dtype,
    'numpy.ndarray': _Array,
    'numpy.core.multiarray._reconstruct': _Array,
    'numpy._core.multiarray._reconstruct': _Array,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
}


def restored(value: Any, done: dict[int, tuple[Any, Any]] | None = None) -> Any:
    """Return what torch.load gave, with NumPy's own arrays in place of their stand-ins; containers change in place."""
    done = {} if done is None else done
    if isinstance(value, (_Array, _Dtype)):
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
