"""What becomes of damaged images and label maps; the table in docs/reliability.md has the same cases."""

import numpy as np
import pytest
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from mmengine_overlock.data import check_data
from mmengine_overlock.data.findings import KINDS
from overlock.utils.errors import UserError
from tests.mmengine_overlock.data_sets import CLASSES, HEIGHT, WIDTH, write_image, write_map, write_maps
from tests.mmengine_overlock.test_data_coco import cut, damage_pixels, table


class Set:
    """A data set to damage: its folder and its configuration."""

    def __init__(self, root):
        self.root, self.cfg = root, write_maps(root)
        self.dataset = self.cfg.train_dataloader.dataset
        self.load = self.dataset.pipeline[0]

    def image(self, number=2, suffix='.jpg'):
        return self.root / 'images' / 'training' / f'{number}{suffix}'

    def map(self, number=2, suffix='.png'):
        return self.root / 'annotations' / 'training' / f'{number}{suffix}'

    def write(self, *values, **more):
        write_map(self.map(), values, **more)

    def list(self, *stems):
        (self.root / 'list.txt').write_text('\n'.join(map(str, stems)))
        self.dataset.ann_file = 'list.txt'

    def count_from_zero(self):
        self.dataset.reduce_zero_label = False
        for number in (1, 2, 3):
            write_map(self.map(number), (0, 1, 2, 255))


def stack(data, count):
    Image.fromarray(np.stack([np.asarray(Image.open(data.map()))] * count, -1)).save(data.map())


def rotate(data, number, follow):
    """Store an image on its side; its map follows EXIF or not."""
    write_image(data.image(number), (HEIGHT, WIDTH) if follow else (WIDTH, HEIGHT), orientation=6)


def two_classes(data):
    """Use two of the classes that its class knows."""
    data.dataset.update(type='ADE20KDataset', metainfo=dict(classes=('sky', 'wall')))
    data.cfg.model = {}


# Case -> what becomes of it, the kind or words of the message, and how the data set gets so.
CASES = {
    'image folder that does not exist': (
        'refused',
        'images/training does not exist',
        lambda d: d.image().parent.rename(d.root / 'x'),
    ),
    'map folder that does not exist': (
        'refused',
        'annotations/training does not exist',
        lambda d: d.map().parent.rename(d.root / 'x'),
    ),
    'no images of the suffix': ('refused', 'has no images *.tif', lambda d: d.dataset.update(img_suffix='.tif')),
    'image without a map': ('refused', '1 of 3 images have no label map, first 2.jpg', lambda d: d.map().unlink()),
    'map without an image': ('told', 'orphan', lambda d: write_map(d.map(4))),
    'image with a suffix of another case': ('told', 'suffix', lambda d: write_image(d.image(4, '.JPG'))),
    'hidden files': ('used', None, lambda d: d.image('._2').write_bytes(b'')),
    'listed image that does not exist': ('refused', 'missing', lambda d: (d.list(1, 2, 3, 4), write_map(d.map(4)))),
    'listed image without a map': (
        'refused',
        '1 of 4 images have no label map, first 4.jpg',
        lambda d: (d.list(1, 2, 3, 4), write_image(d.image(4))),
    ),
    'list of some images': ('used', None, lambda d: (d.list(1, 3), d.map().unlink())),
    'empty image': ('refused', 'broken', lambda d: d.image().write_bytes(b'')),
    'image that is cut off': ('refused', 'broken', lambda d: cut(d.image())),
    'image that is cut off, with `ignore_empty`': (
        'refused',
        'broken',
        lambda d: (cut(d.image()), d.load.update(ignore_empty=True)),
    ),
    'image whose pixels are damaged': ('refused', 'broken', lambda d: damage_pixels(d.image())),
    'empty map': ('refused', 'broken', lambda d: d.map().write_bytes(b'')),
    'map that is cut off': ('refused', 'broken', lambda d: cut(d.map(), 0.7)),
    'text under the name of a map': ('refused', 'broken', lambda d: d.map().write_text('1 2 3')),
    'map of three channels': ('refused', 'channels', lambda d: stack(d, 3)),
    'map of four channels': ('refused', 'channels', lambda d: stack(d, 4)),
    'map with a palette': ('used', None, lambda d: d.write(1, 2, 3, mode='P')),
    'map of 16 bits with values of classes': ('used', None, lambda d: d.write(1, 2, 3, dtype=np.uint16)),
    'map of 16 bits with values beyond 255': ('refused', 'values', lambda d: d.write(1, 258, dtype=np.uint16)),
    'map with a value beyond the classes': ('refused', 'values', lambda d: d.write(1, 2, 3, 4)),
    'map with 255, which is ignored': ('used', None, lambda d: d.write(1, 2, 3, 255)),
    'map with 254 and `reduce_zero_label`': ('refused', 'values', lambda d: d.write(1, 2, 3, 254)),
    'map with 0 and `reduce_zero_label`': ('used', None, lambda d: d.write(0, 1, 2, 3)),
    'maps that count from 0': ('used', None, lambda d: d.count_from_zero()),
    'map that counts from 1 among those': ('refused', 'values', lambda d: (d.count_from_zero(), d.write(1, 2, 3))),
    'maps of two classes as 0 and 255': (
        'told',
        'unseen',
        lambda d: (d.count_from_zero(), [write_map(d.map(n), (0, 255)) for n in (1, 2, 3)]),
    ),
    'other value to ignore than 255': (
        'refused',
        'values',
        lambda d: (d.count_from_zero(), d.cfg.model.decode_head.update(ignore_index=254)),
    ),
    'map without a pixel of a class': ('told', 'ignored', lambda d: d.write(0, 255)),
    'class without a pixel': ('told', 'unseen', lambda d: [write_map(d.map(n), (1, 3)) for n in (1, 2, 3)]),
    'map of another size than its image': ('refused', 'size', lambda d: d.write(1, 2, size=(20, 15))),
    'width and height exchanged': ('refused', 'size', lambda d: d.write(1, 2, size=(HEIGHT, WIDTH))),
    'EXIF rotation that the map follows': ('used', None, lambda d: rotate(d, 2, True)),
    'EXIF rotation that the map ignores': ('repaired', 'rotated', lambda d: rotate(d, 2, False)),
    'EXIF rotations that maps partly follow': (
        'refused',
        'rotations',
        lambda d: (rotate(d, 2, False), rotate(d, 3, True)),
    ),
    'EXIF rotation by 180 degrees': ('told', 'rotation', lambda d: write_image(d.image(), orientation=3)),
    'heads with another number of classes': (
        'refused',
        'heads',
        lambda d: d.cfg.model.auxiliary_head.update(num_classes=150),
    ),
    'no classes': ('refused', 'metainfo', lambda d: d.dataset.pop('metainfo')),
    'classes of the data set, with heads of another size': (
        'refused',
        'heads',
        lambda d: (d.dataset.pop('metainfo'), d.dataset.update(type='ADE20KDataset')),
    ),
    'palette of another length': (
        'refused',
        'metainfo',
        lambda d: d.dataset.metainfo.update(palette=[(255, 0, 0)] * 4),
    ),
    'class named twice': ('refused', 'classes', lambda d: d.dataset.metainfo.update(classes=('cat', 'dog', 'cat'))),
    'classes as one string': ('refused', 'metainfo', lambda d: d.dataset.metainfo.update(classes='cat')),
    "classes that are some of the data set's own": ('used', None, two_classes),
    "class that is not the data set's": (
        'refused',
        'metainfo',
        lambda d: (two_classes(d), d.dataset.metainfo.update(classes=('sky', 'cat'))),
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
    """Return all samples of the data set, as mmseg reads it after the check."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        dataset = DATASETS.build(data.dataset)
        return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize('case', CASES)
def test_damage_is_refused_repaired_or_told(data, case):
    outcome, what, damage = CASES[case]
    damage(data)
    if outcome == 'refused':
        with pytest.raises(UserError, match='The train data set cannot be used: ') as caught:
            check_data(data.cfg, 'train')
        assert KINDS.get(what, (outcome, what))[1] in str(caught.value) and '\n' not in str(caught.value)
        return
    findings = {finding.kind: finding for finding in check_data(data.cfg, 'train')['train']}
    if what is None:
        assert not findings.keys() - {'unseen'} if 'own' in case else not findings
    else:
        assert findings[what].outcome == outcome and findings[what].items
    read = samples(data)
    assert len(read) == (2 if case == 'list of some images' else 3)
    for sample in read:
        labels = sample['data_samples'].gt_sem_seg.data
        # The map lies on the image, and has classes alone.
        assert labels.shape[1:] == sample['inputs'].shape[1:]
        assert set(labels.unique().tolist()) <= {*range(len(CLASSES)), 255}


def test_the_docs_have_the_cases():
    assert table('| segmentation') == [(case, outcome) for case, (outcome, _, _) in CASES.items()]
