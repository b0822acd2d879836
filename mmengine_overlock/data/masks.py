"""Check the masks of annotations in COCO's format."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any, TypeGuard


def are_finite(values: Any) -> TypeGuard[list[float]]:
    """Return whether this is a list of finite numbers."""
    try:
        return isinstance(values, list) and all(map(isfinite, values))
    except (TypeError, OverflowError):
        return False


def check_mask(annotation: dict[str, Any], width: float, height: float) -> Iterator[str]:
    """Yield the kinds of what is wrong with the mask of an annotation; remove the polygons that are none.

    In the middle of a run, pycocotools raises on such masks, and crashes on polygons with NaN.

    Args:
        annotation: Changed in place.
        width: Of its image, in pixels.
        height: Likewise.
    """
    mask = annotation.get('segmentation')
    if isinstance(mask, dict):
        if mask.get('size') != [height, width] or _length(mask.get('counts')) != height * width:
            yield 'rle'
        return
    if mask and are_finite(mask):
        mask = annotation['segmentation'] = [mask]
        yield 'flat'
    parts = mask if isinstance(mask, list) else []
    whole = [part for part in parts if are_finite(part) and len(part) >= 6 and len(part) % 2 == 0]
    if not whole:
        yield 'mask'
    elif len(whole) < len(parts):
        annotation['segmentation'] = whole
        yield 'part'


def _length(counts: Any) -> int | None:
    """Return the number of pixels of a run-length encoding, or None for what is none."""
    if isinstance(counts, str):
        counts = _decode(counts)
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    return sum(counts)


def _decode(text: str) -> list[int] | None:
    """Return the runs of COCO's compressed form: groups of 5 bits, least first; from the fourth on, differences of two.

    The sixth bit of a character says that the number goes on, the highest of the last group is its sign.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs
