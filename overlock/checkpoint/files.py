"""Finding weight files and reading them without running anything that they hold."""

import errno
import os
import pickle
import re
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from torch import Tensor

WEIGHTS_VARIABLE = 'OVERLOCK_WEIGHTS'

# What torch.load raises on files that are cut off, ask for code, or are something else by their first bytes.
UNREADABLE = (pickle.UnpicklingError, OSError, RuntimeError, EOFError, KeyError, IndexError, ValueError, TypeError,
              AttributeError)


class CheckpointError(ValueError):
    """A weight file that cannot be found, read or used for this model."""


def find_file(source: str | os.PathLike) -> Path:
    """The local file of a path or URL.

    A URL is looked for, by its file name, in the folder that `OVERLOCK_WEIGHTS` names, then in torch hub's cache, and
    downloaded into that cache else.

    Raises:
        CheckpointError: If there is no such file, or it cannot be downloaded.
    """
    source = os.fspath(source)
    if urlparse(source).scheme not in ('http', 'https'):
        path = Path(source).expanduser()
        if not path.is_file():
            raise CheckpointError(f'weight file not found: {path}; give the path of a file or a URL')
        return path
    name = Path(urlparse(source).path).name
    cached = Path(torch.hub.get_dir()) / 'checkpoints' / name
    local = [Path(os.environ[WEIGHTS_VARIABLE]).expanduser() / name] if os.environ.get(WEIGHTS_VARIABLE) else []
    for path in (*local, cached):
        if path.is_file():
            return path
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Writes to a temporary file beside the target and moves it when it is whole.
        torch.hub.download_url_to_file(source, str(cached))
    except (URLError, OSError) as error:
        raise CheckpointError(
            f'cannot download {source} ({error}); fetch {name} by other means and put it into the folder that '
            f'{WEIGHTS_VARIABLE} names, or at {cached}') from error
    return cached


def unreadable(path: str | os.PathLike, error: Exception) -> CheckpointError:
    """What to tell of a file on which `torch.load(..., weights_only=True)` raised one of `UNREADABLE`."""
    wanted = re.search(r'GLOBAL (\S+)', str(error))
    if wanted:
        return CheckpointError(
            f'{path} asks for the Python object {wanted[1]}, which a checkpoint could use to run code, and was not '
            'loaded; save it again with tensors, numbers and strings only.')
    # torch seeks before the start of a file that is too short.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return CheckpointError(f'Cannot read the checkpoint {path} ({error}); give the path of a file on this machine.')
    return CheckpointError(f'{path} is not a whole PyTorch checkpoint: it was cut off while it was written, or is '
                           'another kind of file.')


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f'{path} needs the package safetensors; install it with `pip install safetensors`'
                              ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f'{path} is damaged: {error}') from error


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a weight file (.pth or .safetensors), on the CPU, out of their usual wrappings.

    Unwraps `state_dict`, `model`, `state_dict_ema` and the prefix `module.`.

    Raises:
        CheckpointError: If the file is damaged, holds no state dict, or would have to run code to load.
    """
    path = Path(path)
    if path.suffix == '.safetensors':
        return _read_safetensors(path)
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    for wrapper in ('state_dict', 'model', 'state_dict_ema'):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f'{path} holds no state dict')
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if all(name.startswith('module.') for name in tensors):
        tensors = {name.removeprefix('module.'): value for name, value in tensors.items()}
    return tensors
