"""Read weight files without running code: tensors, plain values, NumPy numbers, and the logs of trainers."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from overlock.checkpoint import containers
from overlock.checkpoint.download import find_file
from overlock.utils.errors import CheckpointError

# Trainers put a state dict, and its running average, under these names.
_PLAIN = ('state_dict', 'model')
_AVERAGES = ('state_dict_ema', 'model_ema')
# mmengine's EMAHook puts the average into `state_dict`, and the weights behind it here.
_BEHIND_AVERAGE = 'ema_state_dict'
# DistributedDataParallel, averaging and torch.compile put these before names.
_PREFIXES = ('module.', '_orig_mod.', 'module.')


def load(source: str | os.PathLike[str], ema: bool | None = False) -> dict[str, Tensor]:
    """Return the tensors of a weight file (.pth or .safetensors), on the CPU, out of their usual wrappings.

    Unwraps `state_dict`, `model`, `state_dict_ema`, `model_ema`, and the prefixes `module.` and `_orig_mod.`. In a file
    of mmengine's EMAHook `state_dict` is the average, with or without `ema`.

    Args:
        source: A name in `overlock.checkpoint.WEIGHTS`, a path, or a URL, see `find_file`.
        ema: Whether to take the running average of the weights, where the file has both; None takes it if it is there.

    Raises:
        CheckpointError: If the file cannot be found, is damaged, holds no state dict, no average that was asked for,
            or would have to run code to load.
    """
    path = find_file(source)
    content = read(path)
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
    found = (average if ema else (ema is None and average) or plain or average or content) or {}
    tensors = {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f'{path} holds no state dict: expected tensors by their names, bare or under one of '
            f'{", ".join(_PLAIN + _AVERAGES)}; give a file of weights'
        )
    empty = [name for name, value in tensors.items() if value.is_meta]
    if empty:
        raise CheckpointError(
            f'{path} holds {len(empty)} tensors without values (first {empty[0]}), as on the meta device; save it once '
            'the model has weights'
        )
    for prefix in _PREFIXES:
        # Averaged models count their updates beside the network.
        below = {name: value for name, value in tensors.items() if '.' in name}
        if below and all(name.startswith(prefix) for name in below):
            tensors = {name.removeprefix(prefix): value for name, value in below.items()}
    return tensors


def read(path: str | os.PathLike[str]) -> Any:
    """Return all that a weight file holds, on the CPU.

    Raises:
        CheckpointError: If it is damaged, or would have to run code to load.
    """
    with explained(path):
        return containers.read(path)


def check_whole(path: str | os.PathLike[str]) -> None:
    """Check that nothing of a weight file is missing or changed: an archive of torch.save holds a CRC of each part.

    Raises:
        CheckpointError: If the file is damaged, or cannot be read at all.
    """
    with explained(path):
        containers.check_crcs(path)


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what reading a file raises into one sentence.

    Raises:
        CheckpointError: If the file is damaged, or would have to run code to load.
    """
    try:
        yield
    except MemoryError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f'{path} {error}') from None
    except ImportError as error:
        raise CheckpointError(f'{path} needs a package that is not installed ({error}); install it with pip.') from None
    # A damaged or crafted file can make the unpickler raise anything, and zipfile seek before the start.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise CheckpointError(
                f'Cannot read the checkpoint {path} ({error}); give the path of a file on this machine.'
            ) from None
        raise CheckpointError(
            f'{path} is not a whole PyTorch checkpoint: it was cut off while it was written, was changed since, or '
            'is another kind of file; get it or save it again.'
        ) from None
