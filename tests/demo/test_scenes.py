"""The drawn data set: reproducible, exact, and hard enough to be worth learning."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from demo.detector import draw
from demo.drawing import SCENE_CLASSES as CLASSES
from demo.drawing import silhouette
from overlock.utils.errors import UserError

TRAIN, VAL, SIZE = 40, 12, 96


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return draw(tmp_path_factory.mktemp('shapes') / 'data', train=TRAIN, val=VAL, size=SIZE, seed=3)


@pytest.fixture(scope='module', params=['train', 'val'])
def split(request):
    return request.param


@pytest.fixture(scope='module')
def coco(root, split):
    return COCO(str(root / 'coco' / 'annotations' / f'instances_{split}2017.json'))


def digest(root):
    files = sorted(path for path in root.rglob('*') if path.is_file())
    return hashlib.sha256(
        b''.join(path.relative_to(root).as_posix().encode() + path.read_bytes() for path in files)
    ).hexdigest()


def masks_of(coco, image_id):
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
    return annotations, np.stack([coco.annToMask(annotation) for annotation in annotations]).astype(bool)


def test_same_parameters_give_the_same_bytes(root, tmp_path):
    again = draw(tmp_path / 'again', train=TRAIN, val=VAL, size=SIZE, seed=3)
    assert digest(again) == digest(root)


def test_another_seed_gives_other_scenes(root, tmp_path):
    other = draw(tmp_path / 'other', train=5, val=5, size=SIZE, seed=4)
    name = 'coco/train2017/000001.jpg'
    assert (other / name).read_bytes() != (root / name).read_bytes()


def test_training_and_held_out_scenes_differ(root):
    photos = [path.read_bytes() for path in (root / 'coco').rglob('*.jpg')]
    assert len(set(photos)) == len(photos) == TRAIN + VAL


def test_a_data_set_drawn_earlier_is_replaced(tmp_path):
    expected = digest(draw(tmp_path / 'expected', train=5, val=5, size=64))
    draw(tmp_path / 'data', train=6, val=5, size=64)
    assert digest(draw(tmp_path / 'data', train=5, val=5, size=64)) == expected


def test_files_of_others_are_not_replaced(tmp_path):
    kept = tmp_path / 'photos.txt'
    kept.write_text('mine')
    with pytest.raises(UserError, match='name another folder'):
        draw(tmp_path, train=5, val=5, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ['photos.txt'] and kept.read_text() == 'mine'


@pytest.mark.parametrize('parameters', [dict(train=2), dict(val=0), dict(size=32)])
def test_too_small_a_data_set_is_refused(tmp_path, parameters):
    with pytest.raises(UserError, match='at least'):
        draw(tmp_path / 'data', **parameters)


def test_every_image_has_its_size_and_objects(root, coco, split):
    assert len(coco.imgs) == (TRAIN if split == 'train' else VAL)
    for image in coco.imgs.values():
        with Image.open(root / 'coco' / f'{split}2017' / image['file_name']) as photo:
            assert photo.size == (image['width'], image['height']) == (SIZE, SIZE)
        assert coco.getAnnIds(imgIds=image['id'])


def test_boxes_and_areas_are_those_of_the_visible_mask(coco):
    for image_id in coco.imgs:
        for annotation, mask in zip(*masks_of(coco, image_id), strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            extent = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            assert annotation['bbox'] == extent
            assert annotation['area'] == mask.sum()
            assert annotation['iscrowd'] == 0


def test_visible_masks_do_not_overlap(coco):
    for image_id in coco.imgs:
        assert masks_of(coco, image_id)[1].sum(0).max() == 1


def test_every_class_occurs(coco):
    assert tuple(category['name'] for category in coco.loadCats(coco.getCatIds())) == CLASSES
    for category in coco.getCatIds():
        assert len(coco.getAnnIds(catIds=category)) >= 2


def test_sizes_span_a_factor_of_two_and_more(coco):
    sides = [max(annotation['bbox'][2:]) / SIZE for annotation in coco.anns.values()]
    assert min(sides) < 0.2 and max(sides) > 0.4


def test_shapes_hide_parts_of_each_other(root):
    """A circle inside the image fills pi / 4 of its box, unless something in front has taken pixels of it."""
    coco = COCO(str(root / 'coco' / 'annotations' / 'instances_train2017.json'))
    circles = coco.loadAnns(coco.getAnnIds(catIds=CLASSES.index('circle') + 1))
    filled = [a['area'] / (np.pi / 4 * max(a['bbox'][2:]) ** 2) for a in circles]
    assert max(filled) > 0.95 and min(filled) < 0.9


def test_colors_do_not_tell_the_class(root):
    """The mean colors of classes lie closer together than shapes of one class do."""
    coco = COCO(str(root / 'coco' / 'annotations' / 'instances_train2017.json'))
    colors = {category: [] for category in coco.getCatIds()}
    for image_id, image in coco.imgs.items():
        photo = np.asarray(Image.open(root / 'coco' / 'train2017' / image['file_name']), float)
        for annotation, mask in zip(*masks_of(coco, image_id), strict=True):
            colors[annotation['category_id']].append(photo[mask].mean(0))
    means = np.stack([np.mean(values, 0) for values in colors.values()])
    spread = np.mean([np.std(values, 0).mean() for values in colors.values()])
    assert means.std(0).mean() < 0.5 * spread


@pytest.mark.parametrize(
    ('name', 'area'),
    [
        ('circle', np.pi),
        ('square', 2.0),
        ('triangle', 3 * np.sqrt(3) / 4),
        ('star', 5 * 0.42 * np.sin(np.pi / 5)),
        ('ring', np.pi * (1 - 0.55**2)),
    ],
)
@pytest.mark.parametrize('turn', [0.0, 1.0])
def test_shapes_have_their_geometric_area(name, area, turn):
    radius = 40
    assert silhouette(name, (64, 60), radius, turn, 128, 3).sum() / 9 == pytest.approx(area * radius**2, rel=0.01)


def test_annotation_files_hold_no_path_and_no_date(root):
    text = (root / 'coco' / 'annotations' / 'instances_val2017.json').read_text()
    assert str(root) not in text
    assert set(json.loads(text)['info']) == {'description'}
