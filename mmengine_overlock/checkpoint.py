"""Checkpoint files: read without running code, written whole or not at all, found again to resume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmengine.fileio
import mmengine.runner.checkpoint
from mmengine.fileio import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import nn

from overlock.checkpoint import find_file
from overlock.checkpoint.fitting import compare_weights
from overlock.checkpoint.reading import check_whole, explained, read
from overlock.checkpoint.stand_ins import LoggedValues
from overlock.utils.errors import CheckpointError
from overlock.utils.files import whole_file
from overlock.utils.finite import non_finite

# mmengine's function, and what it loads from, for messages.
_load_by_mmengine = mmengine.runner.checkpoint.load_state_dict
_latest = {'source': 'the state dict'}


def load_from_file(filename: str, map_location: Any = None, **_: Any) -> dict[str, Any]:
    """Load a checkpoint by path, URL or published name; tensors stay on the CPU, as models and optimizers copy them."""
    path = find_file(filename)
    checkpoint = read(path)
    with explained(path):
        _latest['source'] = filename
        return _for_mmengine(checkpoint)


def load_from_storage(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Load a checkpoint from a storage that mmengine's file backends know."""
    with mmengine.fileio.get_local_path(filename, backend_args={'backend': 'petrel'}) as path:
        return load_from_file(str(path))


def _for_mmengine(checkpoint: Any) -> dict[str, Any]:
    """Return a checkpoint with mmengine's logs, and without what its runner would run as code."""
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('state_dict', {}), dict):
        raise CheckpointError('holds no state dict: expected a dictionary of tensors; give a file of weights')
    logs = checkpoint.get('message_hub', {}).get('log_scalars', {})
    for name, value in logs.items():
        if isinstance(value, LoggedValues):
            logs[name] = HistoryBuffer(*value.arguments)
    # `Runner.resume` would read it as a configuration in Python; today's runner writes `cfg`, which it does not read.
    checkpoint.get('meta', {}).pop('config', None)
    return checkpoint


def _load_state_dict(module: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
    """Load what fits, as mmengine does, but no integers, NaN or infinity where the model has real numbers."""
    model: Any = module
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    compare_weights(model, state_dict, _latest['source']).require_numbers()
    _load_by_mmengine(module, state_dict, *args, **kwargs)


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
    for prefix in ('', 'http://', 'https://'):
        CheckpointLoader.register_scheme(prefix, load_from_file, force=True)
    for prefix in (r'(\S+\:)?s3://', r'(\S+\:)?petrel://'):
        CheckpointLoader.register_scheme(prefix, load_from_storage, force=True)
    # A store inside one company, whose loader reads files by itself.
    CheckpointLoader._schemes.pop('pavi://', None)
    module = mmengine.runner.checkpoint
    # The names of model zoos stand for URLs.
    module.load_from_http = load_from_file
    module.load_state_dict = _load_state_dict


def find_resumable(work_dir: str | Path) -> Path | None:
    """Find the checkpoint to continue from: the one in `last_checkpoint`, else the newest that is whole and finite.

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
    # A configuration may keep its checkpoints elsewhere; a folder that was copied has them all.
    elsewhere = named if not newest or not any(path.is_file() for path in inside) else []
    candidates = list(dict.fromkeys([*(inside if newest else []), *elsewhere, *newest]))
    for path in candidates:
        try:
            check_whole(path)
            content = read(path)
            if not isinstance(content, Mapping):
                raise CheckpointError(f'{path} is no checkpoint of a training.')
            if found := non_finite(content.get('state_dict', {})):
                raise CheckpointError(f'{path} holds {len(found)} tensors that are not finite (first {found[0]}).')
            return path
        except CheckpointError as error:
            print_log(f'{error} Trying the one before it.', 'current', logging.WARNING)
    if candidates:
        raise CheckpointError(
            f'None of the checkpoints in {work_dir} is whole; remove them to start again, or give one with '
            '--resume PATH.'
        )
    return None
