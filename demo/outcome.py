"""What both demonstrations share: options, a folder of their own, and an outcome judged by a target."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from overlock.utils.errors import UserError

# Marks a folder that a demonstration may replace.
_MARK = '.demo'


@dataclass(frozen=True)
class Outcome:
    """The results of a demonstration: its figures as a Markdown table, and the one that it is judged by, in percent."""

    title: str
    table: str
    measure: str
    score: float
    target: float
    files: Mapping[str, Path]
    seconds: Mapping[str, float]

    @property
    def reached(self) -> bool:
        return self.score >= self.target

    def __str__(self) -> str:
        steps = ', '.join(f'{step} {seconds:.0f} s' for step, seconds in self.seconds.items())
        verdict = 'reached' if self.reached else 'NOT REACHED'
        lines = {
            **{f'{what}:': os.path.relpath(path) for what, path in self.files.items()},
            'time:': f'{sum(self.seconds.values()) / 60:.1f} min ({steps})',
            f'{self.measure}:': f'{self.score:.1f}, target {self.target}: {verdict}',
        }
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


def add_options(parser: argparse.ArgumentParser, work_dir: str) -> None:
    """Add the options of both tools."""
    how = 'folder for the data and the results (default: %(default)s)'
    parser.add_argument('--work-dir', metavar='DIR', default=work_dir, help=how)
    parser.add_argument('--draw-only', action='store_true', help='draw the data and stop')


def new_folder(path: str | os.PathLike) -> Path:
    """Make an empty folder, in the place of one that an earlier demonstration made.

    Returns:
        The folder, absolute.

    Raises:
        UserError: If the folder is there with other files.
    """
    path = Path(path).absolute()
    if path.exists() and any(path.iterdir()) and not (path / _MARK).exists():
        raise UserError(f'{path} holds files that are of no demonstration; name another folder with --work-dir DIR.')
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    (path / _MARK).touch()
    return path
