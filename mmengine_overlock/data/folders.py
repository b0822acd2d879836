"""Find a data set's parts and classes in a folder: COCO's annotations with their images, or images with label maps."""

from __future__ import annotations

import colorsys
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overlock.utils.errors import UserError

_WORDS = {'train': 'train|training', 'val': 'val|valid|validation', 'test': 'test|testing'}
_DEPTH = 3
# What follows where images are there for training alone.
NO_VAL = '; validation needs images of its own: move a tenth of them, with their labels, into a split val'


@dataclass(frozen=True)
class Part:
    """A split of a data set.

    Attributes:
        images: Folder of the images.
        labels: Annotation file in COCO's format, or folder of the label maps.
        count: Number of images with labels.
    """

    images: Path
    labels: Path
    count: int = 0


@dataclass(frozen=True)
class DataFolder:
    """A data set that was found in a folder.

    Attributes:
        layout: 'coco' or 'masks'.
        root: The folder, absolute, as are the paths of the parts.
        parts: By 'train', 'val', and 'test' where there is one with labels.
        classes: Names, in the order of the category ids or of the values in the maps.
        masks: Whether there are masks to train and to test on.
        suffixes: Of images and label maps, by which their names differ; for 'masks' alone.
        reduce_zero_label: Whether value 0 of the label maps means unlabeled, and value 1 the first class.
        ordered: Whether all annotation files have the classes in their order, as mmdet needs them; else the check of
            the data sorts them in a copy.
        remarks: What was decided on the way, in sentences for the user.
    """

    layout: str
    root: Path
    parts: dict[str, Part]
    classes: tuple[str, ...]
    masks: bool = True
    suffixes: tuple[str, str] = ('.jpg', '.png')
    reduce_zero_label: bool = False
    ordered: bool = True
    remarks: tuple[str, ...] = ()

    @property
    def metainfo(self) -> dict[str, Any]:
        """Return classes and colors, the latter as far from each other in hue as the golden angle brings them."""
        hues = [(number * 0.618034) % 1 for number in range(len(self.classes))]
        colors = [colorsys.hsv_to_rgb(hue, 0.85, 0.95 - 0.3 * (number % 2)) for number, hue in enumerate(hues)]
        palette = [tuple(round(255 * value) for value in color) for color in colors]
        return dict(classes=self.classes, palette=palette)

    def dataset(self, split: str) -> dict[str, Any]:
        """Return the settings by which mmdet's CocoDataset or mmseg's BaseSegDataset reads a split.

        Args:
            split: 'train', 'val' or 'test'; without a part of its own, the latter is 'val'.
        """
        part = self.parts.get(split, self.parts['val'])
        images, labels = (os.path.relpath(path, self.root) for path in (part.images, part.labels))
        settings: dict[str, Any] = dict(data_root=str(self.root), metainfo=self.metainfo)
        if self.layout == 'coco':
            return settings | dict(type='CocoDataset', ann_file=labels, data_prefix=dict(img=images))
        return settings | dict(
            type='BaseSegDataset',
            data_prefix=dict(img_path=images, seg_map_path=labels),
            img_suffix=self.suffixes[0],
            seg_map_suffix=self.suffixes[1],
            reduce_zero_label=self.reduce_zero_label,
        )


def existing(root: str | Path) -> Path:
    """Return a folder as an absolute path.

    Raises:
        UserError: There is none.
    """
    path = Path(root).expanduser().absolute()
    if not path.is_dir():
        raise UserError(f'The folder of data {root} does not exist.')
    return path


def split_of(path: Path, root: Path) -> str | None:
    """Return the split that the name of a file or folder tells, or else that of a folder around it, below a root."""
    for name in reversed(path.relative_to(root).parts):
        for split, words in _WORDS.items():
            if re.search(rf'(?<![a-z])({words})(?![a-z])', name.lower()):
                return split
    return None


def subfolders(root: Path, depth: int = _DEPTH) -> list[Path]:
    """Return the folders below a root, sorted, without hidden ones."""
    found = []
    for folder in sorted(entry.path for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != '.'):
        found += [Path(folder), *(subfolders(Path(folder), depth - 1) if depth > 1 else [])]
    return found


def listed(paths: Sequence[object], root: Path | None = None, most: int = 4) -> str:
    """Return the first of some paths, relative to a root, or of other things."""
    names = [os.path.relpath(str(path), root) if root else str(path) for path in paths]
    return ', '.join(names[:most]) + ', ...' * (len(names) > most)
