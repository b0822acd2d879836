"""An exported file is scored on a test set as mmdet and mmseg score the model."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from pycocotools.mask import encode

from mmengine_overlock.export.scores import score, test_config
from mmengine_overlock.export.subjects import make_subject
from overlock import OverLoCK
from overlock.utils.errors import UserError
from tests.mmengine_overlock.export.conftest import CLASSES
from tests.testing import TINY

test_config.__test__ = False
NAMES = list(CLASSES['classes'])


@torch.no_grad()
def predict(subject, image):
    """Return what the toolbox finds in an image file."""
    return subject.model.test_step(pseudo_collate([subject.pipeline(dict(img_path=str(image), img_id=1))]))[0]


def write_detections(subject, picture, root):
    """Write a data set in COCO's format whose truth is what the model finds."""
    found = predict(subject, picture).pred_instances
    annotations = []
    for index, (box, label, mask) in enumerate(zip(found.bboxes, found.labels, found.masks, strict=True), 1):
        x1, y1, x2, y2 = box.tolist()
        rle = encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        annotations.append(
            dict(
                id=index,
                image_id=1,
                category_id=int(label) + 1,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=(x2 - x1) * (y2 - y1),
                iscrowd=0,
                segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
            )
        )
    images = [dict(id=1, file_name=picture.name, width=203, height=151)]
    categories = [dict(id=number, name=name) for number, name in enumerate(NAMES, 1)]
    (root / 'annotations').mkdir()
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / 'annotations/instances_val2017.json').write_text(json.dumps(content))
    (root / 'val2017').mkdir()
    shutil.copy(picture, root / 'val2017')
    subject.cfg.test_dataloader.dataset.metainfo = dict(classes=NAMES)


def write_labels(subject, picture, root):
    """Write a data set of label maps whose truth is what the model finds."""
    labels = predict(subject, picture).pred_sem_seg.data[0].numpy()
    for folder in ('images', 'maps'):
        (root / folder).mkdir()
    cv2.imwrite(str(root / 'maps' / 'blots.png'), labels.astype(np.uint8))
    shutil.copy(picture, root / 'images' / 'blots.png')
    dataset = subject.cfg.test_dataloader.dataset
    dataset.pipeline.insert(-1, dict(type='LoadAnnotations'))
    dataset.update(type='BaseSegDataset', metainfo=dict(classes=NAMES, palette=CLASSES['palette']))
    dataset.update(data_prefix=dict(img_path='images', seg_map_path='maps'), img_suffix='.png')


def parsed(text):
    return {cells[0]: tuple(map(float, cells[1:])) for cells in map(str.split, text.split('\n')[1:])}


@pytest.mark.parametrize('preprocessing', [False, True])
def test_detector_has_the_box_and_mask_ap_of_mmdet(preprocessing, small, picture, tmp_path):
    subject = make_subject(*map(str, small('mask_rcnn')), preprocessing=preprocessing)
    write_detections(subject, picture, tmp_path)
    cfg = test_config(subject, tmp_path, None)
    text = score(subject.module, 'file', subject, cfg)
    assert text.startswith('test set, 1 images  file')
    found = parsed(text)
    for name in ('coco/bbox_mAP', 'coco/segm_mAP'):
        assert found[name][0] == found[name][1] > 0.9
    boxes_off = score(lambda image: (lambda out: (out[0] + 20, *out[1:]))(subject.module(image)), 'file', subject, cfg)
    wrong, right = parsed(boxes_off)['coco/bbox_mAP']
    assert wrong < right - 0.2


@pytest.mark.parametrize('options', [{}, dict(preprocessing=True), dict(label_map=True)])
def test_segmenter_has_the_miou_of_mmseg(options, small, picture, tmp_path):
    subject = make_subject(*map(str, small('upernet')), **options)
    write_labels(subject, picture, tmp_path)
    cfg = test_config(subject, tmp_path, None)
    exported, truth = parsed(score(subject.module, 'file', subject, cfg))['mIoU']
    # A label map is enlarged to the image's size after the choice of the labels, logits before.
    assert truth == 100 and exported > (90 if options.get('label_map') else 99.9)
    wrong = score(lambda image: [out.roll(40, -1) for out in subject.module(image)], 'file', subject, cfg)
    assert parsed(wrong)['mIoU'][0] < exported - 5


@pytest.mark.parametrize(
    ('kind', 'write', 'size'), [('upernet', write_labels, (96, 128)), ('mask_rcnn', write_detections, (100, 130))]
)
def test_images_have_the_fixed_size(kind, write, size, small, picture, tmp_path):
    subject = make_subject(*map(str, small(kind)))
    write(subject, picture, tmp_path)
    cfg = test_config(subject, tmp_path, size)
    sizes = []
    score(lambda image: sizes.append(tuple(image.shape[2:])) or subject.module(image), 'file', subject, cfg, size)
    assert sizes == [size]


def test_other_networks_have_no_test_set(tmp_path):
    torch.save(OverLoCK(TINY, num_classes=3).state_dict(), tmp_path / 'tiny.pth')
    with pytest.raises(UserError, match='--data-root is for detectors and segmenters, and this is a classifier'):
        test_config(make_subject('overlock_xt', str(tmp_path / 'tiny.pth')), tmp_path, None)
