"""Check annotations in COCO's format with their images, and repair what can be repaired."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine_overlock.data.categories import check_categories
from mmengine_overlock.data.classes import set_classes
from mmengine_overlock.data.files import check_files, read_image, read_images
from mmengine_overlock.data.findings import SHOWN, LayoutError
from mmengine_overlock.data.folders import listed
from mmengine_overlock.data.masks import are_finite, check_mask
from mmengine_overlock.data.sizes import compare_sizes
from mmengine_overlock.data.statistics import Statistics, count_boxes
from overlock.utils.files import whole_file

# Annotations with one of these are left out: the first by the repaired copy, the others by mmdet itself.
REMOVED = {'malformed', 'mask', 'rle'}
UNUSED = REMOVED | {'stray', 'category', 'empty', 'outside'}


def read_coco(ann_file: Path, classes: Sequence[str] | None, labeled: bool) -> dict[str, Any]:
    """Read an annotation file.

    Args:
        ann_file: The file.
        classes: The data set's.
        labeled: Whether annotations are needed.

    Raises:
        LayoutError: It is not JSON, lacks a list, or none of its categories is a class.
    """
    try:
        content = json.loads(ann_file.read_bytes())
    # The latter from brackets without end.
    except (ValueError, RecursionError) as error:
        raise LayoutError(f'{ann_file} is not JSON ({error})') from error
    for key in ('images', 'categories', *(['annotations'] if labeled else [])):
        if not isinstance(content, dict) or not content.get(key) or not isinstance(content[key], list):
            raise LayoutError(f'{ann_file} has no {key}')
        if key != 'annotations' and not all(isinstance(item, dict) for item in content[key]):
            raise LayoutError(f'{ann_file} has {key} that are not objects')
    # mmdet drops the categories that it does not know, even if none is left.
    names = [category.get('name') for category in content['categories']]
    if classes and not set(classes).intersection(map(str, names)):
        theirs, ours = (listed(some, most=SHOWN) for some in (names, classes))
        remedy = set_classes([*map(str, names)])
        raise LayoutError(f'no category of {ann_file} ({theirs}) is one of its classes ({ours}): {remedy}')
    return content


def require_images(content: dict[str, Any], ann_file: Path, folder: Path) -> None:
    """Raise a LayoutError where not one image exists."""
    names = [str(image.get('file_name', '')) for image in content['images']]
    if not any((folder / name).exists() for name in names):
        raise LayoutError(f'{names[0]}, the first image of {ann_file.name}, is not in {folder}, nor is any other')


def write_coco(path: Path, content: dict[str, Any]) -> None:
    """Write an annotation file whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content).encode())


def check_coco(
    content: dict[str, Any],
    folder: Path,
    names: Collection[str],
    classes: Sequence[str],
    masks: bool,
    rotate: bool,
    found: dict[str, list[str]],
) -> tuple[bool, Statistics]:
    """Check annotations and their images.

    Args:
        content: The annotation file, with dictionaries as images and categories; repaired in place.
        folder: Of the images.
        names: Files in it.
        classes: The data set's, in order.
        masks: Whether masks are trained or tested.
        rotate: Whether the run loads images rotated by EXIF.
        found: Items by kind (see `findings.KINDS`); gets more.

    Returns:
        Whether the run has to load the images without EXIF's rotation, and what the run finds in the data set.
    """
    check_categories(content, classes, found)
    check_images(content, names, found)
    files = read_images(folder, [image['file_name'] for image in content['images']])
    check_files(files, len(content['images']), found)
    sizes = {}
    for image in content['images']:
        name, given = image['file_name'], [image.get('width'), image.get('height')]
        if not are_finite(given) or min(given) <= 0:
            found['unsized'].append(name)
            file = files.get(name) or read_image(folder / name)
            image['width'], image['height'] = file.loaded_size(rotate)
        sizes[name] = (image['width'], image['height'])
    ignore = compare_sizes(files, sizes, rotate, found)
    used = check_annotations(content, classes, masks, found) if content.get('annotations') else []
    return ignore, count_boxes(content, used, classes)


def check_evaluator(path: Path, content: dict[str, Any], classes: Sequence[str], found: dict[str, list[str]]) -> None:
    """Compare the annotation file of an evaluator with another one, checked, of the data set that it evaluates."""
    other = read_coco(path, classes, labeled=True)
    theirs = {_key(image.get('id')): str(image.get('file_name')) for image in other['images']}
    ours = {image['id']: image['file_name'] for image in content['images']}
    lost = ours.keys() - theirs.keys()
    if lost:
        found['evaluator'].append(f'{path} lacks {len(lost)} of {len(ours)} images')
    pairs = [(name, theirs[number]) for number, name in ours.items() if number in theirs]
    others = [f'{other} for {name}' for name, other in pairs if _file_name(name) != _file_name(other)]
    if others:
        found['evaluator'].append(f'{path} has other images under {len(others)} of {len(ours)} ids, first {others[0]}')
    names = [category.get('name') for category in other['categories']]
    if [name for name in names if name in classes] != list(classes):
        found['evaluator'].append(f'{path} has not the categories that are classes in their order')


def check_images(content: dict[str, Any], names: Collection[str], found: dict[str, list[str]]) -> None:
    """Take each image once, under the name that its file has on the disk."""
    by_id: dict[Any, dict] = {}
    taken = set()
    spellings = {name.lower(): name for name in names}
    for image in content['images']:
        number, name = image.get('id'), image.get('file_name')
        if not isinstance(number, (int, str)) or not isinstance(name, str) or not name:
            found['entry'].append(f'id {number}, file_name {name}')
            continue
        if name not in names and (other := spellings.get(name.replace('\\', '/').lower())):
            found['spelling'].append(f'{name} ({other})')
            name = image['file_name'] = other
        if number in by_id and by_id[number]['file_name'] == name:
            found['repeated'].append(name)
        elif number in by_id or name in taken:
            found['ids'].append(f'{name} with id {number}')
        else:
            by_id[number] = image
            taken.add(name)
    content['images'] = list(by_id.values())


def check_annotations(
    content: dict[str, Any], classes: Sequence[str], masks: bool, found: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """Repair the annotations of an otherwise whole file, and remove those that mmdet cannot read.

    Returns:
        The annotations of classes that mmdet does not leave out.
    """
    images = {image['id']: image for image in content['images']}
    categories = {category.get('id'): category.get('name') for category in content['categories']}
    kept, used, ids, seen = [], [], set(), set()
    for annotation in content['annotations']:
        if not isinstance(annotation, dict):
            found['malformed'].append(str(annotation))
            continue
        number, image = annotation.get('id'), images.get(_key(annotation.get('image_id')))
        category = categories.get(_key(annotation.get('category_id')))
        flaws = set(_flaws(annotation, image, category, masks))
        # pycocotools takes a match with annotation 0 for none.
        if not _key(number) or number in ids:
            flaws.add('numbering')
        ids.add(_key(number))
        for flaw in flaws:
            place = image['file_name'] if image else f'image {annotation.get("image_id")}'
            found[flaw].append(f'{place} (annotation {number})')
        if not flaws & REMOVED:
            kept.append(annotation)
        if not flaws & UNUSED and category in classes:
            used.append(annotation)
            seen.add(category)
    # Boxes that reach out of their image are also what other conventions look like.
    if len(found['corners']) > len(content['annotations']) / 2:
        found.pop('over', None)
    else:
        found.pop('corners', None)
    if not seen:
        found['unusable'].append(f'{len(content["annotations"])} annotations')
    if found['numbering']:
        for place, annotation in enumerate(kept, 1):
            annotation['id'] = place
    labeled = {annotation['image_id'] for annotation in used}
    found['unlabeled'] += [image['file_name'] for number, image in images.items() if number not in labeled]
    found['unseen'] += [name for name in classes if name not in seen and name not in found['absent']]
    content['annotations'] = kept
    return used


def _file_name(path: str) -> str:
    """Return the last part of a path, as written on any system."""
    return path.replace('\\', '/').rpartition('/')[2].lower()


def _key(value: Any) -> int | float | str | None:
    return value if isinstance(value, (int, float, str)) else None


def _flaws(annotation: dict[str, Any], image: dict | None, category: Any, masks: bool) -> Iterator[str]:
    """Yield the kinds of what is wrong with an annotation; add what lacks."""
    box = annotation.get('bbox')
    if not are_finite(box) or len(box) != 4:
        yield 'malformed'
        return
    if image is None:
        yield 'stray'
    if category is None:
        yield 'category'
    if image is not None:
        yield from _place(box, image['width'], image['height'])
        if masks:
            yield from check_mask(annotation, image['width'], image['height'])
    area = [annotation.get('area')]
    if not are_finite(area) or area[0] <= 0:
        annotation['area'] = box[2] * box[3]
        yield 'area'
    if 'iscrowd' not in annotation:
        annotation['iscrowd'] = 0
        yield 'crowd'


def _place(box: list[float], width: float, height: float) -> Iterator[str]:
    """Yield the kinds of what is wrong with the place of a box in its image."""
    x, y, w, h = box
    if w < 1 or h < 1:
        yield 'empty'
    elif min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        yield 'outside'
    # Published boxes are rounded.
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        yield 'over'
        if x < w <= width + 1 and y < h <= height + 1:
            yield 'corners'
