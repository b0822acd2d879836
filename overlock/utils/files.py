"""Write files whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from overlock.utils.errors import UserError

_SUFFIX = '.draft'


@contextmanager
def drafted(*paths: str | os.PathLike[str]) -> Iterator[list[Path]]:
    """Give paths of the same names in a hidden folder beside `paths`; when the block ends, those files replace `paths`.

    Missing folders above are created. If the block raises, nothing is replaced.

    Raises:
        UserError: The folder cannot be written to.
    """
    first = Path(paths[0])
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=first.parent, prefix=f'.{first.stem}.', suffix=_SUFFIX)
    except OSError as error:
        raise UserError(f'{first} cannot be written ({error}); give a path in a writable folder.') from error
    with temporary as folder:
        drafts = [Path(folder, Path(path).name) for path in paths]
        yield drafts
        for draft, path in zip(drafts, paths, strict=True):
            os.replace(draft, path)


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file for writing; it takes the name `path` when the block ends, and never if the block raises."""
    with drafted(path) as (draft,), draft.open('wb') as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def remove_drafts(folder: str | os.PathLike[str]) -> None:
    """Remove what processes that were killed left of `drafted` in a folder that nobody else writes to."""
    for path in Path(folder).glob(f'.*{_SUFFIX}'):
        shutil.rmtree(path, ignore_errors=True)
