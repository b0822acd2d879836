"""Compare the classes that data sets, their files, the heads of a model and checkpoints name."""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.fileio import list_from_file

from mmengine_overlock.data.findings import SHOWN

# With an output for each class; others, as RPN's, have outputs of their own.
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head')
# A ratio of difflib: `car` and `cat` have 0.67, `dog` and `hot dog` 0.6.
SIMILAR = 0.65


def read_classes(dataset: dict, kind: type | None, found: dict[str, list[str]]) -> list[str] | None:
    """Return the classes of a data set, or None where neither its settings nor its class name them.

    Args:
        dataset: Its settings.
        kind: Its class.
        found: Items by kind; gets more.
    """
    metainfo = dataset.get('metainfo') or {}
    known = getattr(kind, 'METAINFO', {}).get('classes')
    classes = metainfo.get('classes') or known
    if 'classes' in dataset and kind and 'classes' not in inspect.signature(kind).parameters:
        found['metainfo'].append('`classes` beside it; set metainfo = dict(classes=(...))')
    if 'CLASSES' in metainfo:
        found['metainfo'].append('`CLASSES`, which is no longer read; spell it `classes`')
    if isinstance(classes, str) and Path(classes).is_file():
        classes = list_from_file(classes)
    elif isinstance(classes, str):
        several = tuple(name.strip() for name in classes.split(','))
        found['metainfo'].append(f'the string {classes!r} as classes; set metainfo = dict(classes={several})')
        return [classes]
    given = list(classes or ())
    names = list(dict.fromkeys(given))
    found['classes'] += [f'the class {name} twice' for name in names if given.count(name) > 1]
    palette = metainfo.get('palette')
    # mmdet passes over colors that are too many, as mmseg does where it takes some of its own classes.
    most = len(given) if hasattr(kind, 'get_label_map') and not known else float('inf')
    if isinstance(palette, (list, tuple)) and not len(given) <= len(palette) <= most:
        found['metainfo'].append(f'a palette of {len(palette)} colors for {len(given)} classes')
    return names or None


def class_heads(value: Any, name: str = 'model') -> Iterator[tuple[str, dict]]:
    """Yield the heads with an output for each class, with their names, inside the settings of a model."""
    if isinstance(value, dict):
        # The auxiliary heads of STDC learn edges.
        if name in HEADS and value.get('type') != 'STDCHead':
            yield name, value
        for key, item in value.items():
            yield from class_heads(item, key)
    for item in value if isinstance(value, (list, tuple)) else ():
        yield from class_heads(item, name)


def wrong_heads(model: Any, count: int, source: str) -> list[str]:
    """Return the heads of a model whose number of classes is not that of the data set.

    Args:
        model: Settings of the model.
        count: How many classes the data set has.
        source: Where these come from, if not from its settings.
    """
    expected = f'the {count} of {source}, as metainfo names none' if source else count
    heads = dict.fromkeys((name, head['num_classes']) for name, head in class_heads(model) if 'num_classes' in head)
    return [f'{name} with num_classes={number} for {expected}' for name, number in heads if number != count]


def set_classes(names: Sequence[str]) -> str:
    """Return what makes names the classes of a data set."""
    shown = repr(tuple(names)) if len(names) <= SHOWN else f'({repr(names[:SHOWN])[1:-1]}, ...)'
    return f'set metainfo = dict(classes={shown}) in the data set'


def find_misspelt(absent: Sequence[str], unknown: Sequence[str]) -> list[str]:
    """Return the classes that a file lacks and has under a similar name, with that name."""
    similar = {_plain(name): name for name in unknown}
    pairs = ((name, get_close_matches(_plain(name), similar, 1, SIMILAR)) for name in absent)
    return [f'{name} ({similar[matches[0]]} in the file)' for name, matches in pairs if matches]


def compare_classes(classes: Sequence[str], trained: Sequence[str], found: dict[str, list[str]]) -> None:
    """Compare the classes of a data set with those of training: in another order, each has the label of another."""
    labels = {name: label for label, name in enumerate(trained)}
    for label, name in enumerate(classes):
        if labels.get(name, label) != label:
            found['labels'].append(f'{name} ({label} instead of {labels[name]})')
        elif name not in labels and label < len(trained) and trained[label] not in classes:
            found['renamed'].append(f'{name} for {trained[label]}')


def _plain(name: str) -> str:
    # Letters with accents have two spellings that look alike.
    return unicodedata.normalize('NFKC', str(name)).casefold().strip()
