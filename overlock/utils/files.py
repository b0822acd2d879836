"""Write files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from overlock.utils.errors import UserError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file for writing; it takes the name `path` when the block ends, and never if the block raises.

    Missing folders above it are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def drafted(*paths: Path) -> Iterator[list[Path]]:
    """Give paths of the same names in a hidden folder beside `paths`; when the block ends, those files replace `paths`.

    If the block raises, nothing is replaced.

    Raises:
        UserError: The folder cannot be written to.
    """
    parent = paths[0].parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary = TemporaryDirectory(dir=parent, prefix=f'.{paths[0].stem}.')
    except OSError as error:
        raise UserError(f'{paths[0]} cannot be written ({error}); give a path in a writable folder.') from error
    with temporary as folder:
        drafts = [Path(folder, path.name) for path in paths]
        yield drafts
        for draft, path in zip(drafts, paths, strict=True):
            os.replace(draft, path)
