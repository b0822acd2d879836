"""Find the classes that a classifier confuses, and write the matrix of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from overlock.utils.files import whole_file

# Above, names and figures are too small to read in a picture, and left out.
MOST_NAMES = 50


def confused_pairs(confusion: Tensor, classes: tuple[str, ...], count: int = 10) -> list[tuple[str, str, int]]:
    """Return the pairs of different classes that are confused most often, as (class, taken for, images).

    Args:
        confusion: (C, C), int64; how many images of class i are taken for class j.
        classes: Names.
        count: Pairs at most; those that never happen are left out.
    """
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    order = wrong.argsort(descending=True, stable=True)[:count].tolist()
    return [(classes[i // len(classes)], classes[i % len(classes)], int(wrong[i])) for i in order if wrong[i]]


def worst_classes(confusion: Tensor, classes: tuple[str, ...], count: int = 5) -> list[tuple[str, float]]:
    """Return the classes with the lowest accuracy, as (class, percent); those without images are left out."""
    totals = confusion.sum(1)
    accuracy = 100 * confusion.diagonal() / totals.clamp(min=1)
    present = [i for i in accuracy.argsort(stable=True).tolist() if totals[i]]
    return [(classes[i], accuracy[i].item()) for i in present[:count]]


def write_confusion(path: Path, confusion: Tensor, classes: tuple[str, ...]) -> None:
    """Write the matrix: rows are the true classes, columns what they are taken for.

    Args:
        path: File ending in .csv, for the counts, or in .png, for a picture of the shares of each true class.
        confusion: (C, C), int64.
        classes: Names.
    """
    if path.suffix == '.png':
        with whole_file(path) as file:
            _draw(confusion, classes).savefig(file, format='png', dpi=120)
    else:
        counts = confusion.tolist()
        write_csv(path, [['true class', *classes], *([name, *row] for name, row in zip(classes, counts, strict=True))])


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a table whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def _draw(confusion: Tensor, classes: tuple[str, ...]) -> Any:
    # Not pyplot: it would choose a window system.
    from matplotlib.figure import Figure

    shares = (100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = 2.5 + 0.42 * min(len(classes), MOST_NAMES)
    figure = Figure((side + 1, side), layout='constrained')
    axes = figure.add_subplot(xlabel='taken for', ylabel='true class')
    figure.colorbar(
        axes.imshow(shares, cmap='Blues', vmin=0, vmax=100), label='images of the true class (%)', shrink=0.8
    )
    if len(classes) > MOST_NAMES:
        return figure
    names = [name.replace('_', ' ') for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    for i, j in zip(*confusion.numpy().nonzero(), strict=True):
        color = 'white' if shares[i, j] > 50 else 'black'
        axes.text(j, i, f'{shares[i, j]:.0f}', ha='center', va='center', fontsize=8, color=color)
    return figure
