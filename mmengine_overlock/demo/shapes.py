"""Writes the drawn scenes as a COCO and as an ADE20K data set: the same bytes for the same parameters."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from overlock.utils.errors import UserError

from .scenes import CLASSES, Scene, draw_scene

# changed with the drawing, so that a data set of an older drawing is drawn again
_VERSION = 1
_STAMP = 'shapes.json'
_JPEG = dict(format='JPEG', quality=95, subsampling=0)
_ADE_FOLDERS = {'train': 'training', 'val': 'validation'}


def draw(root: str | os.PathLike, train: int = 320, val: int = 48, size: int = 128, seed: int = 0) -> Path:
    """Draws the data set, unless it is there complete and with the same parameters.

    The same scenes are written twice: `coco/` (`annotations/instances_{train,val}2017.json`, `train2017/`,
    `val2017/`; masks, boxes and areas of the visible parts) and `ade/` (`images/{training,validation}/`,
    `annotations/{training,validation}/`; 0 is background, c + 1 is `CLASSES[c]`).

    Args:
        root: Folder to write. It appears whole or not at all; a data set drawn with other parameters is replaced.
        train: Number of training images.
        val: Number of held-out images.
        size: Side of the square images in pixels, at least 64.
        seed: Seed of the scenes.

    Returns:
        `root`, absolute.

    Raises:
        UserError: If a number is out of range, or `root` holds something else than a drawn data set.
    """
    if min(train, val) < len(CLASSES) or size < 64:
        raise UserError(
            f'The drawn data set needs at least {len(CLASSES)} images a split and a size of at least 64, '
            f'got train={train}, val={val}, size={size}; raise what is too low.'
        )
    root = Path(root).absolute()
    counts = {'train': train, 'val': val}
    parameters = dict(version=_VERSION, **counts, size=size, seed=seed)
    if _is_complete(root, parameters):
        return root
    if root.exists() and not (root / _STAMP).is_file() and any(root.iterdir()):
        raise UserError(f'{root} holds other files than a drawn data set; name another folder.')

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as scratch:
        new, old = Path(scratch, 'new'), Path(scratch, 'old')
        for split, count in counts.items():
            _write_split(new, split, _scenes(split, count, size, seed))
        _write_json(new / _STAMP, dict(parameters=parameters, files=_sizes(new)))
        if root.exists():
            os.replace(root, old)
        os.replace(new, root)
    return root


def is_drawn(root: str | os.PathLike) -> bool:
    """Whether a data set drawn by `draw` lies in the folder, with whatever parameters."""
    return Path(root, _STAMP).is_file()


def _scenes(split: str, count: int, size: int, seed: int) -> Iterator[Scene]:
    """Every scene has a generator of its own, so scene k doesn't depend on how many there are."""
    for index in range(count):
        rng = np.random.default_rng((seed, list(_ADE_FOLDERS).index(split), index))
        yield draw_scene(rng, size, first_label=index % len(CLASSES))


def _write_split(root: Path, split: str, scenes: Iterator[Scene]) -> None:
    """Writes one split in both formats."""
    photos = root / 'coco' / f'{split}2017'
    ade_photos = root / 'ade' / 'images' / _ADE_FOLDERS[split]
    ade_maps = root / 'ade' / 'annotations' / _ADE_FOLDERS[split]
    for folder in (photos, ade_photos, ade_maps, root / 'coco' / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)

    images, annotations = [], []
    for image_id, scene in enumerate(scenes, start=1):
        name = f'{image_id:06d}'
        Image.fromarray(scene.image).save(photos / f'{name}.jpg', **_JPEG)
        shutil.copyfile(photos / f'{name}.jpg', ade_photos / f'{name}.jpg')
        Image.fromarray(scene.semantic_map()).save(ade_maps / f'{name}.png')
        height, width = scene.owner.shape
        images.append(dict(id=image_id, file_name=f'{name}.jpg', height=height, width=width))
        for annotation in _annotations(scene):
            annotations.append(dict(id=len(annotations) + 1, image_id=image_id, **annotation))
    categories = [dict(id=i, name=name, supercategory='shape') for i, name in enumerate(CLASSES, start=1)]
    _write_json(
        root / 'coco' / 'annotations' / f'instances_{split}2017.json',
        dict(
            info=dict(description='Drawn geometric shapes'),
            licenses=[],
            images=images,
            categories=categories,
            annotations=annotations,
        ),
    )


def _annotations(scene: Scene) -> Iterator[dict]:
    """COCO annotations of a scene's visible shapes, without their ids."""
    for index, label in enumerate(scene.labels, start=1):
        mask = scene.owner == index
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        yield dict(
            category_id=label + 1,
            segmentation=dict(size=rle['size'], counts=rle['counts'].decode('ascii')),
            bbox=coco_mask.toBbox(rle).tolist(),
            area=int(mask.sum()),
            iscrowd=0,
        )


def _is_complete(root: Path, parameters: dict) -> bool:
    """Whether the folder's stamp tells these parameters and every file of it is there in full."""
    try:
        stamp = json.loads((root / _STAMP).read_text())
    except (OSError, ValueError):
        return False
    if stamp.get('parameters') != parameters:
        return False
    found = _sizes(root)
    return all(found.get(name) == size for name, size in stamp['files'].items())


def _sizes(root: Path) -> dict[str, int]:
    """Bytes of every data file below the folder, by its relative name, in order."""
    files = sorted(path for path in root.rglob('*') if path.is_file() and path.name != _STAMP)
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in files}


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, sort_keys=True) + '\n')
