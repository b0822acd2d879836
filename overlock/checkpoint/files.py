"""Finding weight files and reading them without running anything that they hold."""

from __future__ import annotations

import difflib
import http.client
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overlock.checkpoint.download import download
from overlock.checkpoint.registry import WEIGHTS
from overlock.checkpoint.unpickling import read_pickled, safely
from overlock.utils.errors import CheckpointError

WEIGHTS_VARIABLE = 'OVERLOCK_WEIGHTS'

# Where trainers put a state dict in a file, and the running average of one.
_WRAPPERS = ('state_dict', 'model')
_EMA_WRAPPERS = ('state_dict_ema', 'model_ema')
# What DistributedDataParallel, averaging and torch.compile put before names.
_PREFIXES = ('module.', '_orig_mod.', 'module.')
# mmengine's EMAHook puts the average into `state_dict`, and the weights behind it here.
_BEHIND_AVERAGE = 'ema_state_dict'


def load(source: str | os.PathLike, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of published weights, of a file, or of a URL, by the names in the file, on the CPU.

    Args:
        source: A name in `overlock.checkpoint.WEIGHTS`, a path, or a URL, see `find_file`.
        ema: Whether to take the running average of the weights, where the file has both.

    Raises:
        CheckpointError: See `find_file` and `read_state_dict`.
    """
    return read_state_dict(find_file(source), ema)


def find_file(source: str | os.PathLike) -> Path:
    """The local file of published weights, of a path, or of a URL.

    Names in `overlock.checkpoint.WEIGHTS` stand for their URLs. The file of a URL is looked for, by its name, in the
    folder that `OVERLOCK_WEIGHTS` names, then in torch hub's cache, and downloaded into that cache else: from its own
    URL, or, where it is published and `OVERLOCK_WEIGHTS` is the URL of a folder, from there.

    Raises:
        CheckpointError: If there is no such file, or it cannot be downloaded.
    """
    source = os.fspath(source)
    if source in WEIGHTS and not os.path.isfile(source):
        source = WEIGHTS[source].url
    if _is_url(source):
        return _find_url(source)
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path):
        return path
    close = difflib.get_close_matches(source, WEIGHTS, 3)
    raise CheckpointError(
        f'The weight file {path} does not exist; give the path of a file, a URL, or a name of '
        f'published weights, such as {", ".join(close or list(WEIGHTS)[:1])}.'
    )


def _is_url(text: str) -> bool:
    return text.lower().startswith(('http://', 'https://'))


def _find_url(url: str) -> Path:
    name = Path(url.partition('?')[0]).name
    cached = Path(torch.hub.get_dir(), 'checkpoints', name)
    places = [cached]
    place = os.environ.get(WEIGHTS_VARIABLE, '')
    if place and not _is_url(place):
        folder = Path(os.path.expanduser(place))
        if not folder.is_dir():
            raise CheckpointError(
                f'{WEIGHTS_VARIABLE} must name a folder of weight files, or the URL of one, got '
                f'{place}, which is neither; correct or unset it.'
            )
        places.insert(0, folder / name)
    for path in places:
        if path.is_file():
            return path
    published = next((weights for weights in WEIGHTS.values() if weights.url == url), None)
    source = f'{place.rstrip("/")}/{name}' if published and _is_url(place) else url
    try:
        download(source, cached, published and published.size, published and published.sha256)
    except CheckpointError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CheckpointError(
            f'cannot download {source} ({error}); try again, or fetch {name} by other means and put it into the folder '
            f'that {WEIGHTS_VARIABLE} names, or at {cached}'
        ) from error
    return cached


def read_state_dict(path: str | os.PathLike, ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a weight file (.pth or .safetensors), on the CPU, out of their usual wrappings.

    Unwraps `state_dict`, `model`, `state_dict_ema`, `model_ema`, and the prefixes `module.` and `_orig_mod.`. In a file
    of mmengine's EMAHook `state_dict` is the average, with or without `ema`.

    Args:
        path: The file.
        ema: Whether to take the running average of the weights, where the file has both.

    Raises:
        CheckpointError: If the file is damaged, holds no state dict, no average that was asked for, or would have to
            run code to load.
    """
    path = Path(path)
    content = _read_safetensors(path) if path.suffix == '.safetensors' else read_pickled(path)
    averages, plain = _unwrap(content, _EMA_WRAPPERS), _unwrap(content, _WRAPPERS)
    if ema and averages is None and _unwrap(content, (_BEHIND_AVERAGE,)) is not None:
        averages = plain
    if ema and averages is None:
        raise CheckpointError(
            f'{path} holds no running average of weights: expected one of '
            f'{", ".join((*_EMA_WRAPPERS, _BEHIND_AVERAGE))}; load its weights themselves'
        )
    found = averages if ema or plain is None and averages is not None else content if plain is None else plain
    items = found.items() if isinstance(found, Mapping) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f'{path} holds no state dict: expected tensors by their names, bare or under one of '
            f'{", ".join(_WRAPPERS + _EMA_WRAPPERS)}; give a file of weights'
        )
    for prefix in _PREFIXES:
        # Averaged models count their updates beside the network.
        below = {name: value for name, value in tensors.items() if '.' in name}
        if below and all(name.startswith(prefix) for name in below):
            tensors = {name.removeprefix(prefix): value for name, value in below.items()}
    return tensors


def _unwrap(content: Any, wrappers: tuple[str, ...]) -> Mapping | None:
    inner = (content[name] for name in wrappers if isinstance(content, Mapping) and name in content)
    return next((value for value in inner if isinstance(value, Mapping)), None)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safely(path):
        from safetensors.torch import load_file

        return load_file(path)
