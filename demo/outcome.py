"""The folder of a demonstration: its data set is drawn once, its results replace those of the run before."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from overlock.utils.errors import UserError
from overlock.utils.files import drafted

# Increase with every change of the drawing, so that data sets of an older one are drawn again.
_VERSION = 2
# The second is of data sets drawn by earlier versions.
_STAMP, _OLD_STAMP = 'drawn.json', 'shapes.json'


@dataclass(frozen=True)
class Outcome:
    """The results of a demonstration: its figures as a Markdown table, and the one that it is judged by."""

    title: str
    table: str
    score: float
    files: Mapping[str, Path]
    seconds: Mapping[str, float]

    def __str__(self) -> str:
        steps = ', '.join(f'{step} {seconds:.0f} s' for step, seconds in self.seconds.items())
        lines = {f'{what}:': os.path.relpath(path) for what, path in self.files.items()}
        lines['time:'] = f'{sum(self.seconds.values()) / 60:.1f} min ({steps})'
        width = max(map(len, lines))
        return '\n'.join(
            [f'{self.title}:\n\n{self.table}', *(f'{what:<{width}} {value}' for what, value in lines.items())]
        )


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Store the time that a block takes under the name of its step."""
    begin = time.monotonic()
    yield
    seconds[step] = time.monotonic() - begin


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table with the first row as header; columns but the first are aligned to the right."""
    header, *body = rows
    lines = [header, ['---', *['---:'] * (len(header) - 1)], *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return ''.join(f'| {" | ".join(line)} |\n' for line in aligned)


def draw_once(root: str | os.PathLike, write: Callable[[Path], None], **parameters: int) -> Path:
    """Let `write` draw a data set, unless `root` holds it complete and drawn with the same parameters.

    The folder appears whole or not at all; a data set drawn with other parameters is replaced.

    Returns:
        `root`, absolute.

    Raises:
        UserError: If `root` holds something else than a drawn data set.
    """
    root = Path(root).absolute()
    parameters['version'] = _VERSION
    if _is_complete(root, parameters):
        return root
    if root.exists() and not is_drawn(root) and any(root.iterdir()):
        raise UserError(f'{root} holds other files than a drawn data set; name another folder.')
    with drafted(root) as (new,):
        write(new)
        (new / _STAMP).write_text(json.dumps(dict(parameters=parameters, files=_sizes(new))))
        if root.exists():
            os.replace(root, new.with_name('old'))
    return root


def is_drawn(root: str | os.PathLike) -> bool:
    """Return whether the folder holds a drawn data set, whatever its parameters."""
    return any(Path(root, name).is_file() for name in (_STAMP, _OLD_STAMP))


def clear_results(work_dir: Path, paths: Iterable[Path]) -> None:
    """Remove the results of an earlier demonstration.

    Raises:
        UserError: If they are there without its data set: they are another program's then.
    """
    found = [path for path in paths if path.exists()]
    if found and not is_drawn(work_dir / 'data'):
        raise UserError(
            f'{found[0]} is there, but {work_dir} holds no earlier demonstration: name another folder with '
            '--work-dir DIR.'
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_complete(root: Path, parameters: dict[str, int]) -> bool:
    """Return whether the folder's stamp has these parameters and all its files are complete."""
    try:
        stamp = json.loads((root / _STAMP).read_text())
    except (OSError, ValueError):
        return False
    return bool(stamp.get('parameters') == parameters and stamp['files'].items() <= _sizes(root).items())


def _sizes(root: Path) -> dict[str, int]:
    """Return the bytes of every file below the folder by its relative name."""
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob('*') if path.is_file()}
