"""Checkpoint files: read without running anything they hold, written whole or not at all, found again to resume."""

from __future__ import annotations

import codecs
import functools
import logging
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader

from overlock.checkpoint import CheckpointError
from overlock.checkpoint.files import UNREADABLE, unreadable

_FORCED = {'TORCH_FORCE_WEIGHTS_ONLY_LOAD': '1', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '0'}


def _answers_to(path: str) -> Callable[[Any], Any]:
    """Give a class or function the name that files ask for; torch < 2.6 takes no (callable, name) pairs."""

    def rename(target: Any) -> Any:
        target.__module__, _, target.__name__ = path.rpartition('.')
        target.__qualname__ = target.__name__
        return target

    return rename


@_answers_to('mmengine.logging.history_buffer.HistoryBuffer')
class _LoggedValues:
    """Takes the numbers of a saved HistoryBuffer, and not the functions that its own class would take over."""

    def __setstate__(self, state: dict) -> None:
        self.arguments = state['_log_history'], state['_count_history'], state['max_length']


@_answers_to('builtins.getattr')
def _method_name(owner: object, name: str) -> str:
    """Answers a saved HistoryBuffer, which names its functions by `getattr`, and nothing else."""
    if owner is not _LoggedValues:
        raise pickle.UnpicklingError('Unsupported global: GLOBAL builtins.getattr')
    return name


def _numpy_globals() -> list[Any]:
    """What arrays and scalars of numbers are pickled by, under the module names of NumPy 1 and NumPy 2."""
    functions = {'_reconstruct': np.ndarray(0).__reduce__()[0], 'scalar': np.float64().__reduce__()[0]}
    numbers = '?' + np.typecodes['AllInteger'] + np.typecodes['AllFloat']
    return [
        np.ndarray, np.dtype, *{type(np.dtype(code)) for code in numbers},
        # The bytes of an array; torch allows the second by itself from 2.5 on.
        bytes, codecs.encode,
        *(_answers_to(f'{package}.multiarray.{name}')(functools.partial(function))
          for name, function in functions.items() for package in ('numpy.core', 'numpy._core'))]


_SAFE_GLOBALS = [_LoggedValues, _method_name, *_numpy_globals()]


@contextmanager
def weights_only() -> Iterator[None]:
    """Let every `torch.load` inside take tensors, plain values and mmengine's logs, and refuse all else.

    That holds for loads that ask for everything too, as those of mmengine and torch.hub do on some versions.
    """
    environment = {name: os.environ.get(name) for name in _FORCED}
    allowed = list(torch.serialization.get_safe_globals())
    os.environ.update(_FORCED)
    torch.serialization.add_safe_globals(_SAFE_GLOBALS)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)
        for name, value in environment.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _safely(loader: Callable) -> Callable:
    """Wrap one of mmengine's loaders so that it runs no code of the file and explains a file it cannot read."""

    @functools.wraps(loader)
    def load(filename: str, map_location: Any = None) -> Any:
        try:
            with weights_only():
                checkpoint = loader(filename, map_location)
        except torch.cuda.OutOfMemoryError:
            raise
        except UNREADABLE as error:
            raise unreadable(filename, error) from error
        return _with_history(checkpoint)

    load.is_weights_only = True
    return load


def _with_history(checkpoint: Any) -> Any:
    hub = checkpoint.get('message_hub') if isinstance(checkpoint, dict) else None
    for name, value in (hub or {}).get('log_scalars', {}).items():
        if isinstance(value, _LoggedValues):
            hub['log_scalars'][name] = HistoryBuffer(*value.arguments)
    return checkpoint


class WholeFileBackend(LocalBackend):
    """mmengine's local files, except that a file of this name is either the old one or the complete new one."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
        try:
            with temporary.open('wb') as file:
                file.write(obj)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        self.put(obj.encode(encoding), filepath)


def use_safe_files() -> None:
    """Make mmengine read checkpoints of every scheme safely and write files whole; a second call changes nothing."""
    register_backend('local', WholeFileBackend, force=True, prefixes='')
    for prefix, loader in list(CheckpointLoader._schemes.items()):
        if not hasattr(loader, 'is_weights_only'):
            CheckpointLoader.register_scheme(prefix, _safely(loader), force=True)


def find_resumable(work_dir: str | Path) -> Path | None:
    """Find the checkpoint to go on from: the one named in `last_checkpoint`, else the newest that is whole.

    Args:
        work_dir: Folder of the earlier run; it need not exist.

    Returns:
        The checkpoint, or None where nothing was saved yet.

    Raises:
        CheckpointError: Checkpoints were saved, but none of them is whole.
    """
    work_dir = Path(work_dir)
    pointer = work_dir / 'last_checkpoint'
    named = [Path(line) for line in pointer.read_text().split('\n')[:1] if line] if pointer.is_file() else []
    # `best_*.pth` hold no optimizer state.
    saved = [path for path in work_dir.glob('*.pth') if not path.name.startswith('best_')]
    candidates = [*named, *sorted(saved, key=lambda path: path.stat().st_mtime, reverse=True)]
    for path in candidates:
        if zipfile.is_zipfile(path):
            return path
        print_log(f'{path} is missing or was cut off while it was written; trying the one before it.',
                  'current', logging.WARNING)
    if candidates:
        raise CheckpointError(
            f'None of the checkpoints in {work_dir} is whole; remove them to start again, or give one with '
            '--resume PATH.')
    return None
