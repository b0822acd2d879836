"""Small COCO and ADE20K data sets on disk, and mmengine's scope, given back by every test."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.configs import testing


@pytest.fixture(autouse=True)
def keep_default_scope():
    with testing.default_scope():
        yield


def _write_coco_split(root: Path, split: str, shapes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    (root / split).mkdir(parents=True)
    (root / 'annotations').mkdir(exist_ok=True)
    images, annotations = [], []
    for index, (height, width) in enumerate(shapes, start=1):
        file_name = f'{index:012d}.png'
        cv2.imwrite(str(root / split / file_name), rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        images.append(dict(id=index, file_name=file_name, height=height, width=width))
        for category_id in (1, 2):
            x, y = 10 * category_id, 8 * category_id
            w, h = width // 2, height // 2
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index,
                    category_id=category_id,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                )
            )
    categories = [dict(id=1, name='person'), dict(id=2, name='bicycle')]
    with open(root / 'annotations' / f'instances_{split}.json', 'w') as f:
        json.dump(dict(images=images, annotations=annotations, categories=categories), f)


@pytest.fixture(scope='session')
def coco_root(tmp_path_factory) -> Path:
    """Write a COCO folder: in each split, images of 120 x 200 and 150 x 90 (height x width), two rectangles in each."""
    root = tmp_path_factory.mktemp('coco')
    for split in ('train2017', 'val2017'):
        _write_coco_split(root, split, [(120, 200), (150, 90)])
    return root


@pytest.fixture(scope='session')
def ade_root(tmp_path_factory) -> Path:
    """Write an ADEChallengeData2016 folder: in each split, one image of 300 x 401, labels 0 (left third) and 1 to 3."""
    root = tmp_path_factory.mktemp('ade')
    image = np.random.default_rng(0).integers(0, 256, (300, 401, 3), dtype=np.uint8)
    labels = np.zeros((300, 401), dtype=np.uint8)
    labels[:100, 134:], labels[100:200, 134:], labels[200:, 134:] = 1, 2, 3
    for split in ('training', 'validation'):
        for kind, name, array in (('images', 'scene.jpg', image), ('annotations', 'scene.png', labels)):
            (root / kind / split).mkdir(parents=True)
            cv2.imwrite(str(root / kind / split / name), array)
    return root
