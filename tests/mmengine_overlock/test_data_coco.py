"""What becomes of damaged data sets in COCO's format; the table in docs/reliability.md has the same cases."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, METRICS, DefaultScope

from mmengine_overlock.data import check_data
from mmengine_overlock.data.findings import KINDS
from overlock.utils.errors import UserError
from tests.mmengine_overlock.data_sets import CLASSES, HEIGHT, WIDTH, annotation, write_coco, write_image
from tests.testing import ROOT


class Set:
    """A data set to damage: its folder, configuration and annotations."""

    def __init__(self, root):
        self.root, self.cfg, self.path = root, write_coco(root), root / 'annotations' / 'a.json'
        self.dataset = self.cfg.train_dataloader.dataset.dataset
        self.load, self.evaluator = self.dataset.pipeline[0], self.cfg.train_evaluator
        self.content = json.loads(self.path.read_text())
        self.images, self.boxes, self.categories = (self.content[k] for k in ('images', 'annotations', 'categories'))

    def image(self, number=2):
        return self.root / 'train' / f'{number}.jpg'

    def write(self):
        if self.content is not None:
            self.path.write_text(json.dumps(self.content))

    def text(self, text):
        self.path.write_text(text)
        self.content = None

    def set(self, **changes):
        self.content |= changes

    def box(self, **changes):
        self.boxes[1].update(changes)

    def without(self, *keys):
        for key in keys:
            del self.boxes[1][key]

    def write_other(self, **changes):
        path = self.root / 'annotations' / 'b.json'
        path.write_text(json.dumps(self.content | changes))
        self.evaluator.ann_file = str(path)


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def damage_pixels(path):
    write_image(path, format='PNG')
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def rotate(data, number, follow):
    """Store an image on its side; the labels follow EXIF or not."""
    write_image(data.image(number), (HEIGHT, WIDTH) if follow else (WIDTH, HEIGHT), orientation=6)


def spell(data, name, other):
    data.image(2).rename(data.root / 'train' / other) if '/' not in other else write_image(data.root / 'train' / other)
    data.images[1]['file_name'] = name


def rle(height=HEIGHT, width=WIDTH, counts=(300, 100, HEIGHT * WIDTH - 400)):
    return dict(size=[height, width], counts=[*counts] if isinstance(counts, tuple) else counts)


def compressed(height=HEIGHT, width=WIDTH):
    import pycocotools.mask

    mask = np.zeros((height, width), np.uint8, order='F')
    mask[6:18, 5:25] = 1
    return pycocotools.mask.encode(mask)['counts'].decode()


def corners(data):
    for box in data.boxes:
        box['bbox'] = [15, 10, 39, 29]


def normalize(data):
    for box in data.boxes:
        box['bbox'] = [0.1, 0.2, 0.5, 0.4]


# Case -> what becomes of it, the kind or words of the message, and how the data set gets so.
CASES = {
    'annotation file that does not exist': (
        'refused',
        'a.json does not exist',
        lambda d: (d.text(''), d.path.unlink()),
    ),
    'empty annotation file': ('refused', 'a.json is not JSON', lambda d: d.text('')),
    'annotation file that is cut off': ('refused', 'a.json is not JSON', lambda d: d.text(json.dumps(d.content)[:-20])),
    'annotation file of nested brackets': ('refused', 'a.json is not JSON', lambda d: d.text('[' * 100_000)),
    'list instead of an object': ('refused', 'a.json has no images', lambda d: d.text('[]')),
    'no images': ('refused', 'a.json has no images', lambda d: d.set(images=[])),
    'no annotations': ('refused', 'a.json has no annotations', lambda d: d.set(annotations=[])),
    'no categories': ('refused', 'a.json has no categories', lambda d: d.set(categories=[])),
    'categories that are names': ('refused', 'categories that are not objects', lambda d: d.set(categories=['cat'])),
    'image folder that does not exist': (
        'refused',
        'train does not exist',
        lambda d: (d.root / 'train').rename(d.root / 'x'),
    ),
    'no image in the folder': ('refused', 'nor is any other', lambda d: [d.image(n).unlink() for n in (1, 2, 3)]),
    'one image that does not exist': ('refused', 'missing', lambda d: d.image().unlink()),
    'link to an image that does not exist': (
        'refused',
        'missing',
        lambda d: (d.image().unlink(), d.image().symlink_to('nowhere')),
    ),
    'image that does not exist, with `ignore_empty`': (
        'told',
        'skipped',
        lambda d: (d.image().unlink(), d.load.update(ignore_empty=True)),
    ),
    'empty image': ('refused', 'broken', lambda d: d.image().write_bytes(b'')),
    'image that is cut off': ('refused', 'broken', lambda d: cut(d.image())),
    'image whose pixels are damaged': ('refused', 'broken', lambda d: damage_pixels(d.image())),
    'text under the name of an image': ('refused', 'broken', lambda d: d.image().write_text('<html>')),
    'GIF under the name of a JPEG': ('refused', 'broken', lambda d: write_image(d.image(), format='GIF')),
    'PNG under the name of a JPEG': ('used', None, lambda d: write_image(d.image(), format='PNG')),
    'data behind the end of an image': (
        'used',
        None,
        lambda d: d.image().write_bytes(d.image().read_bytes() + b'\0' * 10_000),
    ),
    'file name of another case': ('repaired', 'spelling', lambda d: spell(d, '2.jpg', '2.JPG')),
    'file name with backslashes': ('repaired', 'spelling', lambda d: spell(d, 'a\\2.jpg', 'a/2.jpg')),
    'image without a file name': ('refused', 'entry', lambda d: d.images[1].pop('file_name')),
    'image without an id': ('refused', 'entry', lambda d: d.images[1].pop('id')),
    'image listed twice': ('repaired', 'repeated', lambda d: d.images.append(dict(d.images[1]))),
    'two images of one id': ('refused', 'ids', lambda d: d.images[1].update(id=1)),
    'two ids of one image': ('refused', 'ids', lambda d: d.images[1].update(file_name='1.jpg')),
    'image of another size than listed': ('refused', 'size', lambda d: d.images[1].update(width=80, height=60)),
    'width and height exchanged': ('refused', 'size', lambda d: d.images[1].update(width=HEIGHT, height=WIDTH)),
    'no width and height': ('repaired', 'unsized', lambda d: (d.images[1].pop('width'), d.images[1].pop('height'))),
    'width and height as text': ('repaired', 'unsized', lambda d: d.images[1].update(width='40', height='30')),
    'EXIF rotation that the labels follow': ('used', None, lambda d: rotate(d, 2, True)),
    'EXIF rotation that the labels ignore': ('repaired', 'rotated', lambda d: rotate(d, 2, False)),
    'EXIF rotations that labels partly follow': (
        'refused',
        'rotations',
        lambda d: (rotate(d, 2, False), rotate(d, 3, True)),
    ),
    'EXIF rotation by 180 degrees': ('told', 'rotation', lambda d: write_image(d.image(), orientation=3)),
    'categories in another order than the classes': ('repaired', 'order', lambda d: d.categories.reverse()),
    'fewer categories than the model has': (
        'repaired',
        'absent',
        lambda d: (d.categories.pop(0), d.boxes.pop(0), d.images.pop(0)),
    ),
    'class that is misspelt': (
        'refused',
        'misspelt',
        lambda d: d.dataset.metainfo.update(classes=('cat', 'dgo', 'bird')),
    ),
    'class in other letters': (
        'refused',
        'misspelt',
        lambda d: d.dataset.metainfo.update(classes=('CAT', 'dog', 'bird')),
    ),
    'class that the file lacks, beside a category of another name': (
        'repaired',
        'absent',
        lambda d: d.categories[0].update(name='horse'),
    ),
    'no metainfo, with a category beyond those of mmdet': (
        'refused',
        'metainfo',
        lambda d: (d.dataset.pop('metainfo'), d.categories[0].update(name='fox')),
    ),
    'no metainfo, with heads of another size': ('refused', 'heads', lambda d: d.dataset.pop('metainfo')),
    'classes beside metainfo': ('refused', 'metainfo', lambda d: d.dataset.update(classes=CLASSES)),
    'classes in capitals in metainfo': (
        'refused',
        'metainfo',
        lambda d: d.dataset.update(metainfo=dict(CLASSES=CLASSES)),
    ),
    'palette of another length': (
        'refused',
        'metainfo',
        lambda d: d.dataset.metainfo.update(palette=[(255, 0, 0), (0, 255, 0)]),
    ),
    'category that is no class': ('told', 'unknown', lambda d: d.categories.insert(0, dict(id=7, name='fish'))),
    'no category that is a class': (
        'refused',
        'no category of',
        lambda d: [category.update(name=category['name'].upper()) for category in d.categories],
    ),
    'two categories of one name': (
        'refused',
        'classes',
        lambda d: (d.categories.append(dict(id=4, name='cat')), d.box(category_id=4)),
    ),
    'two categories of one name, one of them without annotations': (
        'repaired',
        'double',
        lambda d: d.categories.insert(0, dict(id=0, name='cat')),
    ),
    'two categories of one id': ('refused', 'classes', lambda d: d.categories[2].update(id=1)),
    'category without an id': ('refused', 'classes', lambda d: d.categories[2].pop('id')),
    'class named twice': ('refused', 'classes', lambda d: d.dataset.metainfo.update(classes=(*CLASSES, 'cat'))),
    'classes as one string': ('refused', 'metainfo', lambda d: d.dataset.metainfo.update(classes='cat')),
    'heads with another number of classes': (
        'refused',
        'heads',
        lambda d: d.cfg.model.roi_head.bbox_head.update(num_classes=80),
    ),
    'box with NaN': ('repaired', 'malformed', lambda d: d.box(bbox=[5, 6, math.nan, 12])),
    'box with infinity': ('repaired', 'malformed', lambda d: d.box(bbox=[5, 6, math.inf, 12])),
    'box of three numbers': ('repaired', 'malformed', lambda d: d.box(bbox=[5, 6, 7])),
    'box of text': ('repaired', 'malformed', lambda d: d.box(bbox=['5', '6', '7', '8'])),
    'no box': ('repaired', 'malformed', lambda d: d.without('bbox')),
    'annotation that is no object': ('repaired', 'malformed', lambda d: d.boxes.append(None)),
    'box without an area': ('told', 'empty', lambda d: d.box(bbox=[5, 6, 0, 12])),
    'box of negative width': ('told', 'empty', lambda d: d.box(bbox=[25, 6, -20, 12])),
    'box outside of its image': ('told', 'outside', lambda d: d.box(bbox=[50, 6, 20, 12])),
    'box that reaches out of its image': ('told', 'over', lambda d: d.box(bbox=[30, 6, 20, 12])),
    'boxes as x1, y1, x2, y2': ('refused', 'corners', corners),
    'boxes as shares of the image': ('refused', 'unusable', normalize),
    'no area': ('repaired', 'area', lambda d: d.without('area')),
    'area of 0': ('repaired', 'area', lambda d: d.box(area=0)),
    'no iscrowd': ('repaired', 'crowd', lambda d: d.without('iscrowd')),
    'no mask': ('repaired', 'mask', lambda d: d.without('segmentation')),
    'no mask at all': ('refused', 'unusable', lambda d: [box.pop('segmentation') for box in d.boxes]),
    'no mask, where none is trained': (
        'used',
        None,
        lambda d: (
            d.without('segmentation'),
            d.dataset.pipeline[1].update(with_mask=False),
            d.evaluator.update(metric='bbox'),
        ),
    ),
    'empty list of polygons': ('repaired', 'mask', lambda d: d.box(segmentation=[])),
    'polygon of two points': ('repaired', 'mask', lambda d: d.box(segmentation=[[5, 6, 25, 18]])),
    'polygon of two points beside a whole one': (
        'repaired',
        'part',
        lambda d: d.boxes[1]['segmentation'].append([5, 6, 25, 18]),
    ),
    'polygon of an odd count of numbers': (
        'repaired',
        'mask',
        lambda d: d.box(segmentation=[[5, 6, 25, 6, 25, 18, 5]]),
    ),
    'polygon with NaN': ('repaired', 'mask', lambda d: d.box(segmentation=[[5, 6, 25, 6, 25, math.nan]])),
    'polygon outside of a list': ('repaired', 'flat', lambda d: d.box(segmentation=d.boxes[1]['segmentation'][0])),
    'run-length encoding': ('used', None, lambda d: d.box(segmentation=rle())),
    'compressed run-length encoding': ('used', None, lambda d: d.box(segmentation=rle(counts=compressed()))),
    'run-length encoding of another size': (
        'repaired',
        'rle',
        lambda d: d.box(segmentation=rle(60, 80, compressed(60, 80))),
    ),
    'run-length encoding beyond its image': ('repaired', 'rle', lambda d: d.box(segmentation=rle(counts=(300, 9**9)))),
    'run-length encoding of noise': ('repaired', 'rle', lambda d: d.box(segmentation=rle(counts='o' * 40 + '00'))),
    'run-length encoding without size': ('repaired', 'rle', lambda d: d.box(segmentation=dict(counts=[300, 900]))),
    'two annotations of one id': ('repaired', 'numbering', lambda d: d.box(id=1)),
    'annotation of id 0': ('repaired', 'numbering', lambda d: d.box(id=0)),
    'annotation without an id': ('repaired', 'numbering', lambda d: d.without('id')),
    'annotation of an unknown image': ('told', 'stray', lambda d: d.box(image_id=9)),
    'image ids as text in annotations': (
        'refused',
        'unusable',
        lambda d: [box.update(image_id=str(box['image_id'])) for box in d.boxes],
    ),
    'annotation of an unknown category': ('told', 'category', lambda d: d.box(category_id=9)),
    'image without annotations': ('told', 'unlabeled', lambda d: d.box(image_id=1)),
    'class without annotations': ('told', 'unseen', lambda d: d.box(category_id=1)),
    'evaluator with the file of other images': (
        'refused',
        'evaluator',
        lambda d: d.write_other(images=[dict(image, id=image['id'] + 5) for image in d.images]),
    ),
    'evaluator with the file of other images under the same ids': (
        'refused',
        'evaluator',
        lambda d: d.write_other(images=[dict(image, file_name=f'0{image["id"]}.jpg') for image in d.images]),
    ),
    'evaluator with categories in another order': (
        'refused',
        'evaluator',
        lambda d: d.write_other(categories=d.categories[::-1]),
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def data(tmp_path):
    (tmp_path / 'data').mkdir()
    return Set(tmp_path / 'data')


def samples(data):
    """Return all samples of the data set, as mmdet reads it after the check."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(data.dataset)
        return [dataset[index]['data_samples'] for index in range(len(dataset))]


def score(data, truth):
    """Return the lowest mAP of predictions that equal the truth."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        metric = METRICS.build(data.evaluator)
    metric.dataset_meta = dict(classes=CLASSES)
    for sample in truth:
        given = sample.gt_instances
        predicted = dict(bboxes=given.bboxes.tensor, labels=given.labels, scores=torch.ones(len(given)))
        if 'masks' in given:
            predicted['masks'] = torch.from_numpy(given.masks.masks.astype(bool))
        metric.process({}, [dict(pred_instances=predicted, img_id=sample.img_id, ori_shape=sample.ori_shape)])
    return min(value for name, value in metric.evaluate(len(truth)).items() if name.endswith('mAP'))


@pytest.mark.parametrize('case', CASES)
def test_damage_is_refused_repaired_or_told(data, case):
    outcome, what, damage = CASES[case]
    damage(data)
    data.write()
    original = data.path.read_bytes() if data.path.is_file() else b''
    if outcome == 'refused':
        with pytest.raises(UserError, match='The train data set cannot be used: ') as caught:
            check_data(data.cfg, 'train')
        assert KINDS.get(what, (outcome, what))[1] in str(caught.value) and '\n' not in str(caught.value)
        assert what not in KINDS or KINDS[what][0] == outcome
        return
    findings = {finding.kind: finding for finding in check_data(data.cfg, 'train')['train']}
    if what is None:
        assert not findings
    else:
        assert findings[what].outcome == outcome and findings[what].items
        assert findings[what].message in (data.root / 'work' / 'data_check.txt').read_text()
    # The data of the user stays, and the run reads what the check promises.
    assert (data.path.read_bytes() if data.path.is_file() else b'') == original
    truth = samples(data)
    if what == 'skipped':
        assert len(truth) == 3
        return
    names = {name: label for label, name in enumerate(CLASSES)}
    assert all(sample.gt_instances.bboxes.tensor.isfinite().all() for sample in truth)
    # Each image has one box, of the class of its number.
    if what not in ('unlabeled', 'unseen'):
        for sample in truth:
            right = [names[CLASSES[int(Path(sample.img_path).stem) - 1]]]
            assert sample.gt_instances.labels.tolist() in (right, [])
    assert sum(len(sample.gt_instances) for sample in truth) == expected_boxes(case, what)
    if outcome != 'told':
        assert score(data, truth) == 1


def expected_boxes(case, what):
    if case == 'annotation that is no object':
        return 3
    lost = {'malformed', 'empty', 'outside', 'mask', 'rle', 'stray', 'category', 'absent'}
    return 2 if what in lost else 3


def test_what_mmdet_clips_and_leaves_out_are_the_boxes_that_the_check_says(data):
    data.box(bbox=[30, 6, 20, 12])
    data.boxes += [annotation(4, (5, 6, 0.5, 12), image_id=1, category_id=1)]
    data.dataset.pipeline.insert(2, dict(type='RandomFlip', prob=0.0))
    data.dataset.pipeline.insert(2, dict(type='Resize', scale=(WIDTH, HEIGHT), keep_ratio=True))
    data.write()
    kinds = [finding.kind for finding in check_data(data.cfg, 'train')['train']]
    assert kinds == ['empty', 'over'] or kinds == ['over', 'empty']
    boxes = [sample.gt_instances.bboxes.tensor.tolist() for sample in samples(data)]
    assert boxes == [[[5, 6, 25, 18]], [[30, 6, 40, 18]], [[5, 6, 25, 18]]]


def test_the_repaired_order_gives_each_class_its_own_label_and_mmdet_alone_does_not(data):
    data.categories.reverse()
    data.write()
    assert [sample.gt_instances.labels.item() for sample in samples(data)] == [2, 1, 0]
    check_data(data.cfg, 'train')
    assert [sample.gt_instances.labels.item() for sample in samples(data)] == [0, 1, 2]
    assert data.dataset.ann_file == data.evaluator.ann_file != 'annotations/a.json'


def test_the_message_has_ten_items_and_the_file_all(data):
    data.images += [dict(id=number, file_name=f'{number}.jpg', width=4, height=3) for number in range(10, 30)]
    data.write()
    with pytest.raises(UserError) as caught:
        check_data(data.cfg, 'train')
    message, listed = str(caught.value), (data.root / 'work' / 'data_check.txt').read_text().splitlines()
    assert '(20): 10.jpg' in message and message.count('.jpg') == 10 and '--no-check' in message
    assert [f'{number}.jpg' for number in range(10, 30)] == sorted({line for line in listed if line.endswith('.jpg')})


def table(heading):
    """Return the cases and what becomes of them in the table below a heading of the docs."""
    text = (ROOT / 'docs' / 'reliability.md').read_text().partition(heading)[2]
    rows = [line.split('|')[1:3] for line in text.partition('\n\n')[0].splitlines()[2:]]
    return [(case.strip(), outcome.strip()) for case, outcome in rows]


def test_the_docs_have_the_cases():
    assert table('| detection') == [(case, outcome) for case, (outcome, _, _) in CASES.items()]
