"""Which classes a classifier takes for which."""

from __future__ import annotations

import csv
import io
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from overlock.utils.errors import UserError
from overlock.utils.files import whole_file

# Above, names are too small to read in a picture.
MOST_IN_PICTURE = 50


def confused_pairs(confusion: Tensor, classes: tuple[str, ...], count: int = 10) -> list[tuple[str, str, int]]:
    """The pairs of different classes that are confused most often, as (class, taken for, images).

    Args:
        confusion: (C, C), int64; how many images of class i are taken for class j.
        classes: Names.
        count: Pairs at most; those that never happen are left out.
    """
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    order = wrong.argsort(descending=True, stable=True)[:count].tolist()
    return [(classes[i // len(classes)], classes[i % len(classes)], int(wrong[i])) for i in order if wrong[i]]


def worst_classes(confusion: Tensor, classes: tuple[str, ...], count: int = 5) -> list[tuple[str, float]]:
    """The classes with the lowest accuracy, as (class, percent); those without images are left out."""
    totals = confusion.sum(1)
    accuracy = 100 * confusion.diagonal() / totals.clamp(min=1)
    present = [i for i in accuracy.argsort(stable=True).tolist() if totals[i]]
    return [(classes[i], accuracy[i].item()) for i in present[:count]]


def check_confusion_file(path: Path, classes: int) -> None:
    """Checks, before any work, that the matrix can be written.

    Raises:
        UserError: If the name ends in neither .csv nor .png, or there are too many classes for a picture.
    """
    if path.suffix not in ('.csv', '.png'):
        raise UserError(f'--confusion takes a file name that ends in .csv or .png, got {path}.')
    if path.suffix == '.png' and find_spec('matplotlib') is None:
        raise UserError(
            '--confusion FILE.png needs the package matplotlib; install it with `pip install matplotlib` '
            'or write a .csv.'
        )
    if path.suffix == '.png' and classes > MOST_IN_PICTURE:
        raise UserError(
            f'A picture of {classes} classes is not readable, at most {MOST_IN_PICTURE} are; write '
            f'{path.with_suffix(".csv").name} instead.'
        )


def write_confusion(path: Path, confusion: Tensor, classes: tuple[str, ...]) -> None:
    """Writes the matrix, rows the true classes, columns what they are taken for.

    Args:
        path: File ending in .csv, for the counts, or in .png, for a picture of the shares of each true class.
        confusion: (C, C), int64.
        classes: Names.
    """
    if path.suffix == '.csv':
        text = io.StringIO()
        table = csv.writer(text, lineterminator='\n')
        table.writerow(['true class', *classes])
        table.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
        content = text.getvalue().encode()
    else:
        content = _picture(confusion, classes)
    with whole_file(path) as file:
        file.write(content)


def _picture(confusion: Tensor, classes: tuple[str, ...]) -> bytes:
    # Not pyplot: it would choose a window system.
    from matplotlib.figure import Figure

    shares = (100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    side = 2.5 + 0.42 * len(classes)
    figure = Figure((side + 1, side), layout='constrained')
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(image, label='images of the true class (%)', shrink=0.8)
    axes.set_xticks(range(len(classes)), [name.replace('_', ' ') for name in classes], rotation=90)
    axes.set_yticks(range(len(classes)), [name.replace('_', ' ') for name in classes])
    axes.set_xlabel('taken for')
    axes.set_ylabel('true class')
    for i, j in zip(*confusion.numpy().nonzero(), strict=True):
        axes.text(
            j,
            i,
            f'{shares[i, j]:.0f}',
            ha='center',
            va='center',
            fontsize=8,
            color='white' if shares[i, j] > 50 else 'black',
        )
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=120)
    return content.getvalue()
