"""Draw labeled images of a data set as SVG, which shows names in any language."""

from __future__ import annotations

import base64
import colorsys
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from mmengine_overlock.data.coco import REMOVED
from mmengine_overlock.data.masks import are_finite, check_mask

Color = tuple[int, int, int]
# Longer side of a picture, in pixels.
SIDE = 480
# Likewise, as the page shows it.
SHOWN = 300


class Drawn(NamedTuple):
    """A picture: SVG or an `<img>`, the name of the file, and the classes in it, by their most frequent."""

    markup: str
    name: str
    classes: list[str]


def colors_of(count: int, palette: Sequence[Sequence[int]] | None = None) -> list[Color]:
    """Return a color for each class: those of a palette that fits, else hues that are far from each other."""
    if palette is not None and len(palette) == count:
        return [(int(r), int(g), int(b)) for r, g, b in palette]
    hues = [colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.85, 0.9) for number in range(count)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues]


def draw_boxes(
    ann_file: Path, folder: Path, classes: Sequence[str], colors: Sequence[Color], flags: int, masks: bool, count: int
) -> Iterator[Drawn]:
    """Draw boxes, and masks, of some images of a checked annotation file in COCO's format.

    Args:
        ann_file: The file.
        folder: Of its images.
        classes: Names.
        colors: By class.
        flags: OpenCV's, to read images by.
        masks: Whether the masks were checked, too.
        count: At most so many pictures.
    """
    content = json.loads(ann_file.read_bytes())
    names = {item.get('id'): item.get('name') for item in content['categories']}
    labels: dict[Any, list[dict]] = defaultdict(list)
    for item in content['annotations']:
        if isinstance(item, dict) and names.get(item.get('category_id')) in classes and are_finite(item.get('bbox')):
            labels[item.get('image_id')].append(item)
    files = {image['file_name']: labels[image.get('id')] for image in content['images'] if image.get('file_name')}
    shown = {name: [names[item['category_id']] for item in items] for name, items in files.items()}
    for name in choose(shown, count * 2):
        pixels = _read(folder / name, flags)
        if pixels is None:
            continue
        height, width = pixels.shape[:2]
        marks, items = [], sorted(files[name], key=lambda item: -item['bbox'][2] * item['bbox'][3])
        for item in items:
            color = colors[classes.index(names[item['category_id']])]
            if masks and not REMOVED & {*check_mask(item, width, height)}:
                marks.append(_mask(item['segmentation'], color, pixels))
            marks.append(_box(item['bbox'], names[item['category_id']], color, max(width, height) / SHOWN))
        scale = f'viewBox="0 0 {width} {height}"'
        picture = f'<image href="{_encoded(pixels)}" width="{width}" height="{height}"/>'
        yield Drawn(f'<svg {scale}>{picture}{"".join(marks)}</svg>', name, list(dict.fromkeys(shown[name])))


def draw_maps(
    folders: tuple[Path, Path],
    pairs: Mapping[str, str],
    classes: Mapping[int, str],
    colors: Sequence[Color],
    flags: int,
    count: int,
) -> Iterator[Drawn]:
    """Draw label maps over some images.

    Args:
        folders: Of the images, and of the label maps.
        pairs: Label maps by image.
        classes: By value in the maps.
        colors: By class, in their order.
        flags: OpenCV's, to read images by.
        count: At most so many pictures.
    """
    lookup = np.zeros((256, 4), np.uint8)
    for (value, _), color in zip(classes.items(), colors, strict=True):
        lookup[value] = (*color[::-1], 1)
    for image, name in random.Random(0).sample([*pairs.items()], min(len(pairs), count * 2)):
        pixels, values = _read(folders[0] / image, flags), _read_map(folders[1] / name)
        if pixels is None or values is None or values.shape != pixels.shape[:2]:
            continue
        drawn = lookup[np.minimum(values, 255)]
        labeled = drawn[..., 3:].astype(bool)
        mixed = np.where(labeled, pixels // 2 + drawn[..., :3] // 2, pixels)
        found = np.bincount(np.minimum(values, 255).ravel(), minlength=256)
        names = [classes[value] for value in np.argsort(-found).tolist() if found[value] and value in classes]
        yield Drawn(f'<img src="{_encoded(mixed)}" alt="">', image, names)


def choose(shown: Mapping[str, Sequence[str]], count: int) -> list[str]:
    """Return some labeled images: first those that show a class that none before does, then others; always the same.

    Args:
        shown: Classes by image.
        count: At most so many.
    """
    order = [name for name, classes in shown.items() if classes]
    random.Random(0).shuffle(order)
    first, seen = [], set[str]()
    for name in order:
        if not seen.issuperset(shown[name]):
            first.append(name)
            seen.update(shown[name])
    return list(dict.fromkeys([*first, *order]))[:count]


def _read(path: Path, flags: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.fromfile(path, np.uint8), flags)
    except (OSError, cv2.error):
        return None


def _read_map(path: Path) -> np.ndarray | None:
    try:
        values = np.asarray(Image.open(path))
    # As in the check, which names the file.
    except Exception:
        return None
    return values if values.ndim == 2 else None


def _encoded(pixels: np.ndarray) -> str:
    scale = min(1.0, SIDE / max(pixels.shape[:2]))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else pixels
    content = cv2.imencode('.jpg', small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return f'data:image/jpeg;base64,{base64.b64encode(content).decode()}'


def _mask(mask: Any, color: Color, pixels: np.ndarray) -> str:
    """Return polygons as SVG; paint a run-length encoding into the image."""
    if isinstance(mask, dict):
        from pycocotools import mask as coding

        whole = coding.frPyObjects(mask, *mask['size']) if isinstance(mask['counts'], list) else mask
        inside = coding.decode(whole).astype(bool)
        pixels[inside] = pixels[inside] // 2 + np.array(color[::-1], np.uint8) // 2
        return ''
    paths = ' '.join('M' + ' '.join(f'{value:g}' for value in part) + 'Z' for part in mask)
    return f'<path d="{paths}" fill="rgb{color}" fill-opacity=".4"/>'


def _box(box: Sequence[float], name: str, color: Color, scale: float) -> str:
    """Return a box with its name as SVG; `scale` is the size of a pixel of the page in pixels of the image."""
    x, y, width, height = box
    place = f'x="{x + 3 * scale:g}" y="{y + 13 * scale:g}" font-size="{12 * scale:g}" stroke-width="{3 * scale:g}"'
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{max(height, 0):g}" stroke="rgb{color}" '
        f'fill="none" stroke-width="{1.5 * scale:g}"/><text {place}>{escape(name)}</text>'
    )
