"""Write files whole or not at all, and keep their hashes beside them."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from overlock.utils.errors import UserError

# Of the images that are found in folders.
IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')

_SUFFIX = '.draft'


@contextmanager
def drafted(*paths: str | os.PathLike[str]) -> Iterator[list[Path]]:
    """Give paths of the same names in a hidden folder beside `paths`; when the block ends, those files replace `paths`.

    Missing folders above are created. If the block raises, nothing is replaced.

    Raises:
        UserError: The folder cannot be written to.
    """
    with _beside(Path(paths[0])) as folder:
        drafts = [Path(folder, Path(path).name) for path in paths]
        yield drafts
        for draft, path in zip(drafts, paths, strict=True):
            os.replace(draft, path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check, before long work, that a file of this path can be written, or the folders above it that are missing.

    Raises:
        UserError: The folder cannot be written to.
    """
    above = next(folder for folder in Path(path).absolute().parents if folder.exists())
    _beside(Path(path), above).cleanup()


def _beside(path: Path, folder: Path | None = None) -> TemporaryDirectory[str]:
    try:
        if folder is None:
            path.parent.mkdir(parents=True, exist_ok=True)
        return TemporaryDirectory(dir=folder or path.parent, prefix=f'.{path.stem}.', suffix=_SUFFIX)
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error}); give a path in a writable folder.') from None


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file for writing; it takes the name `path` when the block ends, and never if the block raises."""
    try:
        with drafted(path) as (draft,), draft.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch.save raises an error of its own behind that of the system, which does not tell the file.
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        reason.filename = reason.filename or os.fspath(path)
        raise reason from None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as hexadecimal digits; a process reads a file once, unless size or time change."""
    stat = os.stat(path)
    return _sha256(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: str, *_: int) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_file(path: str | os.PathLike[str]) -> Path:
    """Return the path beside a file that its SHA-256 is kept at."""
    return Path(f'{os.fspath(path)}.sha256')


def keep_hash(path: str | os.PathLike[str], sha256: str) -> None:
    """Keep the SHA-256 of a file beside it, as the command sha256sum writes it."""
    with whole_file(hash_file(path)) as file:
        file.write(f'{sha256}  {Path(path).name}\n'.encode())


def kept_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 that is kept beside a file; '' if none is."""
    try:
        return hash_file(path).read_text(errors='replace')[:64]
    except FileNotFoundError:
        return ''


def remove_drafts(folder: str | os.PathLike[str]) -> None:
    """Remove what processes that were killed left of `drafted` in a folder that nobody else writes to."""
    for path in Path(folder).glob(f'.*{_SUFFIX}'):
        shutil.rmtree(path, ignore_errors=True)
