"""Count what a data set has: images by size, boxes by class and size, pixels by class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmengine_overlock.data.files import ImageFile

# Where COCO's evaluation calls the area (in pixels) of an object medium and large.
MEDIUM, LARGE = 32**2, 96**2


@dataclass
class Statistics:
    """What a run finds in a data set, without what it leaves out.

    Attributes:
        images: How many.
        unlabeled: Images without a label of a class.
        classes: By class: 'images' that show it, and its 'boxes' with those that are 'small', 'medium' and 'large',
            or its 'pixels'.
        sizes: [width, height, images], the most frequent first.
        crowds: Boxes of crowds, which are not among the others.
        ignored: Pixels of no class.
    """

    images: int = 0
    unlabeled: int = 0
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: list[list[int]] = field(default_factory=list)
    crowds: int = 0
    ignored: int = 0

    def total(self, what: str) -> int:
        """Return a sum over all classes."""
        return sum(counts.get(what, 0) for counts in self.classes.values())

    @property
    def smallest_and_largest(self) -> str:
        """Sizes of the images with the fewest and the most pixels."""
        ends = [f'{width}x{height}' for width, height, _ in sorted(self.sizes, key=lambda size: size[0] * size[1])]
        return ' to '.join(dict.fromkeys([*ends[:1], *ends[-1:]]))

    def __str__(self) -> str:
        text = f'{self.images:,} images of {self.smallest_and_largest or "unknown size"}'
        text += f', {self.unlabeled:,} without labels' if self.unlabeled else ''
        shown = sum(bool(counts.get('images')) for counts in self.classes.values())
        named = f'{shown} of {len(self.classes)} classes' if shown < len(self.classes) else f'{shown} classes'
        boxes, pixels = self.total('boxes'), self.total('pixels')
        if boxes:
            shares = ', '.join(f'{self.total(size) / boxes:.0%} {size}' for size in ('small', 'medium', 'large'))
            return f'{text}, {boxes:,} boxes of {named} ({shares})'
        share = f' ({self.ignored / (pixels + self.ignored):.0%} of the pixels have none)' if self.ignored else ''
        return f'{text}, {named}{share}'

    def __add__(self, other: Statistics) -> Statistics:
        classes = {
            name: dict(Counter(self.classes.get(name, {})) + Counter(other.classes.get(name, {})))
            for name in self.classes | other.classes
        }
        sizes = Counter({(w, h): count for w, h, count in self.sizes})
        sizes.update({(w, h): count for w, h, count in other.sizes})
        return Statistics(
            self.images + other.images,
            self.unlabeled + other.unlabeled,
            classes,
            _most_frequent(sizes),
            self.crowds + other.crowds,
            self.ignored + other.ignored,
        )


def count_boxes(content: Mapping[str, Any], used: Iterable[Mapping[str, Any]], classes: Sequence[str]) -> Statistics:
    """Count the boxes of a checked file in COCO's format.

    Args:
        content: The file.
        used: Its annotations that a run uses, each with `area` and `iscrowd`.
        classes: Of the data set.
    """
    names = {category.get('id'): category.get('name') for category in content['categories']}
    counts: dict[str, Counter[str]] = {name: Counter() for name in classes}
    shown, labeled, crowds = set(), set(), 0
    for annotation in used:
        name, area = names[annotation['category_id']], annotation['area']
        if name not in counts:
            continue
        labeled.add(annotation['image_id'])
        if annotation['iscrowd']:
            crowds += 1
            continue
        shown.add((name, annotation['image_id']))
        counts[name].update(('boxes', 'small' if area < MEDIUM else 'medium' if area < LARGE else 'large'))
    for name, _ in shown:
        counts[name]['images'] += 1
    return Statistics(
        len(content['images']),
        len(content['images']) - len(labeled),
        {name: dict(count) for name, count in counts.items()},
        _most_frequent(Counter((image['width'], image['height']) for image in content['images'])),
        crowds,
    )


def count_pixels(maps: Mapping[str, ImageFile], images: Iterable[ImageFile], classes: Mapping[int, str]) -> Statistics:
    """Count the pixels of label maps.

    Args:
        maps: By name, with the values of their pixels.
        images: Likewise, with their sizes.
        classes: By value.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in classes.values()}
    unlabeled = ignored = 0
    for file in maps.values():
        known = [
            (classes[value], count) for value, count in zip(file.values, file.counts, strict=True) if value in classes
        ]
        for name, count in known:
            counts[name].update(images=1, pixels=count)
        unlabeled += bool(file.values) and not known
        ignored += sum(file.counts) - sum(count for _, count in known)
    sizes = Counter(image.size for image in images if not image.problem)
    classified = {name: dict(count) for name, count in counts.items()}
    return Statistics(len(maps), unlabeled, classified, _most_frequent(sizes), 0, ignored)


def _most_frequent(sizes: Counter[tuple[int, int]]) -> list[list[int]]:
    return [[*size, count] for size, count in sizes.most_common()]
