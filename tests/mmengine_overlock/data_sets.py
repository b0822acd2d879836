"""Small whole data sets for tests of what damaged ones do."""

import json
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

CLASSES = ('cat', 'dog', 'bird')
WIDTH, HEIGHT = 40, 30


def write_image(path, size=(WIDTH, HEIGHT), orientation=1, format='JPEG'):
    """Write a noisy image, stored in a size (width, height), with an EXIF orientation."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format, **({'exif': exif} if orientation > 1 else {}))


def write_map(path, values=(1, 2, 3), size=(WIDTH, HEIGHT), dtype=np.uint8, mode=None):
    """Write a label map of vertical stripes of values."""
    pixels = np.asarray(values, dtype)[np.arange(size[0]) * len(values) // size[0]]
    image = Image.fromarray(np.tile(pixels, (size[1], 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    (image.convert(mode) if mode else image).save(path)


def annotation(number, box=(5, 6, 20, 12), **more):
    """An annotation of the image and the category of the same number, with a rectangle as mask."""
    x, y, w, h = box
    corners = [x, y, x + w, y, x + w, y + h, x, y + h]
    given = dict(id=number, image_id=number, category_id=number, bbox=[*box], area=w * h, iscrowd=0)
    return given | dict(segmentation=[corners]) | more


def write_coco(root: Path) -> Config:
    """Write three images with a box each, of three classes; the configuration trains and tests masks."""
    for number in (1, 2, 3):
        write_image(root / 'train' / f'{number}.jpg')
    content = dict(
        images=[dict(id=n, file_name=f'{n}.jpg', width=WIDTH, height=HEIGHT) for n in (1, 2, 3)],
        annotations=[annotation(number) for number in (1, 2, 3)],
        categories=[dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)],
    )
    (root / 'annotations').mkdir()
    (root / 'annotations' / 'a.json').write_text(json.dumps(content))
    dataset = dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='annotations/a.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=CLASSES),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs'),
        ],
    )
    metric = dict(type='CocoMetric', ann_file=str(root / 'annotations' / 'a.json'), metric=['bbox', 'segm'])
    loader = dict(dataset=dict(type='RepeatDataset', dataset=dataset))
    model = dict(roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)))
    return Config(
        dict(
            default_scope='mmdet',
            work_dir=str(root / 'work'),
            model=model,
            train_dataloader=loader,
            train_evaluator=metric,
        )
    )


def write_maps(root: Path) -> Config:
    """Write three images with label maps of three classes, 0 for none."""
    for number in (1, 2, 3):
        write_image(root / 'images' / 'training' / f'{number}.jpg')
        write_map(root / 'annotations' / 'training' / f'{number}.png')
    dataset = dict(
        type='BaseSegDataset',
        data_root=str(root),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        metainfo=dict(classes=CLASSES),
        reduce_zero_label=True,
        pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')],
    )
    model = dict(decode_head=dict(num_classes=3), auxiliary_head=dict(num_classes=3))
    return Config(
        dict(default_scope='mmseg', work_dir=str(root / 'work'), model=model, train_dataloader=dict(dataset=dataset))
    )
