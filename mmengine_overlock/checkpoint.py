"""Checkpoint files: read without running code, written whole or not at all, found again to resume."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmengine.runner.checkpoint
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader

from overlock.checkpoint.reading import LoggedValues, check_whole, restored, safely
from overlock.utils.errors import CheckpointError
from overlock.utils.files import whole_file

# Where this is set, a torch.load without `weights_only` runs the code of a file.
_TRUSTING = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'


def _safely(loader: Callable) -> Callable:
    """Wrap one of mmengine's loaders so that it runs no code of the file and explains a file it cannot read."""

    @functools.wraps(loader)
    def load(filename: str, map_location: Any = None) -> Any:
        with safely(filename):
            trusting = os.environ.pop(_TRUSTING, None)
            try:
                return _with_history(restored(loader(filename, map_location)))
            finally:
                if trusting is not None:
                    os.environ[_TRUSTING] = trusting

    load.is_weights_only = True  # type: ignore[attr-defined]
    return load


def _with_history(checkpoint: Any) -> Any:
    hub = checkpoint.get('message_hub') if isinstance(checkpoint, dict) else None
    logs = (hub or {}).get('log_scalars', {})
    for name, value in logs.items():
        if isinstance(value, LoggedValues):
            logs[name] = HistoryBuffer(*value.arguments)
    return checkpoint


class WholeFileBackend(LocalBackend):
    """mmengine's local files, except that a file of this name is either the old one or the complete new one."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with whole_file(filepath) as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        self.put(obj.encode(encoding), filepath)


def use_safe_files() -> None:
    """Make mmengine read checkpoints of every scheme safely and write files whole; a second call changes nothing."""
    register_backend('local', WholeFileBackend, force=True, prefixes='')
    for prefix, loader in list(CheckpointLoader._schemes.items()):
        if not hasattr(loader, 'is_weights_only'):
            CheckpointLoader.register_scheme(prefix, _safely(loader), force=True)
    # Unlike torch.load, torch.hub takes any object by default.
    mmengine.runner.checkpoint.load_url = functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)


def find_resumable(work_dir: str | Path) -> Path | None:
    """Find the checkpoint to continue from: the one named in `last_checkpoint`, else the newest that is whole.

    A file of that name in the folder itself comes first: the folder may be a copy of the one that the path names.

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
    newest = sorted(saved, key=lambda path: path.stat().st_mtime, reverse=True)
    inside = [work_dir / path.name for path in named]
    # A configuration may keep its checkpoints elsewhere.
    candidates = list(dict.fromkeys([*inside, *newest] if newest else named))
    for path in candidates:
        try:
            check_whole(path)
            return path
        except CheckpointError as error:
            print_log(f'{error} Trying the one before it.', 'current', logging.WARNING)
    if candidates:
        raise CheckpointError(
            f'None of the checkpoints in {work_dir} is whole; remove them to start again, or give one with '
            '--resume PATH.'
        )
    return None
