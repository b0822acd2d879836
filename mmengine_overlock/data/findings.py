"""What a check of a data set finds: one record a kind, as a sentence, as JSON, and as a list in a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from overlock.utils.files import whole_file

REFUSED, REPAIRED, TOLD = 'refused', 'repaired', 'told'

# Kind -> outcome and message. 'repaired': in the copy of the annotations, or by the settings, that the run uses.
KINDS = {
    # Files
    'missing': (REFUSED, 'files that do not exist'),
    'broken': (REFUSED, 'files that cannot be decoded'),
    'size': (REFUSED, 'images of another size than their annotations or label maps'),
    'spelling': (REPAIRED, 'file names that are spelled otherwise on disk, taken as on disk'),
    'rotated': (REPAIRED, 'images with an EXIF rotation that their labels ignore, loaded without it, as all others'),
    'rotations': (
        REFUSED,
        'images with an EXIF rotation that their labels ignore, beside others whose labels follow it',
    ),
    'rotation': (TOLD, 'images with an EXIF rotation, where sizes do not show whether their labels follow it'),
    'skipped': (TOLD, 'images that do not exist, which `ignore_empty` replaces by others'),
    'unread': (TOLD, 'files left unread to save time'),
    # Classes
    'heads': (REFUSED, 'heads with another number of classes than the data set'),
    'metainfo': (REFUSED, 'metainfo that does not fit the data'),
    'labels': (REFUSED, 'classes with another label than in training'),
    'classes': (REFUSED, 'classes or categories that cannot be told apart'),
    'misspelt': (
        REFUSED,
        'classes that the file does not have, beside a category of a similar name that is no class (correct the one '
        'or the other; where both are meant, add the class to the categories of the file)',
    ),
    'order': (REPAIRED, 'categories in another order than the classes, put into theirs'),
    'double': (REPAIRED, 'categories without annotations that have the name of another one, left out'),
    'absent': (REPAIRED, 'classes without a category in the file, added without annotations'),
    'unknown': (TOLD, 'categories that are no class, left out by mmdet'),
    'renamed': (TOLD, 'classes of another name than in training'),
    # Images and annotations in COCO's format
    'entry': (REFUSED, 'images without an id or a file name'),
    'ids': (REFUSED, 'ids of more than one image, or files with more than one id'),
    'repeated': (REPAIRED, 'images listed more than once, taken once'),
    'unsized': (REPAIRED, 'images without width and height, taken from their headers'),
    'numbering': (REPAIRED, 'annotation ids that are missing, 0 or not unique, numbered anew'),
    'malformed': (REPAIRED, 'annotations without a finite bbox of [x, y, width, height], left out'),
    'area': (REPAIRED, 'annotations without an area, taken from their boxes'),
    'crowd': (REPAIRED, 'annotations without iscrowd, taken as 0'),
    'flat': (REPAIRED, 'polygons that are not in a list, put into one'),
    'part': (REPAIRED, 'annotations with a polygon that is not three or more pairs of numbers, which is left out'),
    'mask': (REPAIRED, 'annotations without a mask, left out'),
    'rle': (REPAIRED, 'annotations with a run-length encoding that does not fit their image, left out'),
    'stray': (TOLD, 'annotations of images that are not in the file, left out by mmdet'),
    'category': (TOLD, 'annotations of categories that are not in the file, left out by mmdet'),
    'empty': (TOLD, 'boxes below one pixel, left out by mmdet'),
    'outside': (TOLD, 'boxes outside of their image, left out by mmdet'),
    'over': (TOLD, 'boxes that reach out of their image, clipped by the transforms'),
    'corners': (REFUSED, 'boxes that look like [x1, y1, x2, y2] instead of [x, y, width, height]'),
    'unusable': (REFUSED, 'files without one annotation that can be used'),
    'unlabeled': (TOLD, 'images without annotations of a class'),
    'unseen': (TOLD, 'classes without annotations'),
    'evaluator': (REFUSED, 'annotation files of evaluators that do not fit the data set'),
    # Label maps
    'channels': (REFUSED, 'label maps with several channels instead of one of class indices'),
    'values': (REFUSED, 'label maps with values that are no class'),
    'ignored': (TOLD, 'label maps without a pixel of a class'),
    'suffix': (TOLD, 'files whose suffix differs from the expected one in case, left out by mmseg'),
    'orphan': (TOLD, 'label maps without an image'),
}
# Their items are names of classes.
NAMING = {'order', 'double', 'absent', 'unknown', 'renamed', 'unseen'}
SHOWN = 10


@dataclass(frozen=True)
class Finding:
    """Everything of one kind in a data set.

    Attributes:
        kind: One of KINDS, or 'layout' for a data set that cannot be read at all.
        outcome: 'refused', 'repaired' or 'told'.
        message: What the items are, and what becomes of them.
        items: Files, annotations or names, with details.
    """

    kind: str
    outcome: str
    message: str
    items: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return max(1, len(self.items))

    def skipped(self) -> Finding:
        """Return this for a run with `ignore_empty`, which passes over missing images, not over broken ones."""
        return Finding('skipped', *KINDS['skipped'], self.items) if self.kind == 'missing' else self

    def brief(self) -> str:
        """Return the message with names of classes, or with a number of files or annotations."""
        return str(self) if self.kind in NAMING else f'{self.message} ({self.count})'

    def __str__(self) -> str:
        shown = ', '.join(self.items[:SHOWN]) + ', ...' * (len(self.items) > SHOWN)
        return f'{self.message} ({len(self.items)}): {shown}' if self.items else self.message


class LayoutError(Exception):
    """A data set that cannot be read at all: why."""

    @classmethod
    @contextmanager
    def expecting(cls, layout: str) -> Iterator[None]:
        """Add the expected layout to the message."""
        try:
            yield
        except cls as error:
            raise cls(f'{error}; expected {layout}') from error


def group(found: Mapping[str, list[str]]) -> list[Finding]:
    """Return what was found, as items by kind, as records: the refused first."""
    records = [Finding(kind, *KINDS[kind], items) for kind, items in found.items() if items]
    return sorted(records, key=lambda record: (REFUSED, REPAIRED, TOLD).index(record.outcome))


def write_list(path: Path, findings: Mapping[str, Iterable[Finding]]) -> None:
    """Write all items of the findings of every data set, by its name, into a text file."""
    lines = []
    for name, records in findings.items():
        for record in records:
            lines += [f'{name}: {record.outcome}: {record.message} ({record.count})', *record.items, '']
    with whole_file(path) as file:
        file.write('\n'.join(lines).encode('utf-8', 'surrogateescape'))
