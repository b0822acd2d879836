import json

import pytest
from mmengine.config import Config

from mmengine_overlock.data import check_data
from overlock.utils.errors import UserError


@pytest.fixture
def coco(tmp_path):
    """A configuration and a folder of one image in COCO's layout."""
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train' / '1.jpg').touch()
    content = dict(
        images=[dict(id=1, file_name='1.jpg')], annotations=[dict(id=1)], categories=[dict(id=1, name='cat')]
    )
    (tmp_path / 'annotations' / 'a.json').write_text(json.dumps(content))
    dataset = dict(
        type='CocoDataset', data_root=str(tmp_path), ann_file='annotations/a.json', data_prefix=dict(img='train/')
    )
    loader = dict(dataset=dict(type='RepeatDataset', dataset=dataset))
    return Config(dict(default_scope='mmdet', train_dataloader=loader))


@pytest.fixture
def ade(tmp_path):
    """A configuration and a folder of one image in ADE20K's layout."""
    for folder, name in (('images', '1.jpg'), ('annotations', '1.png')):
        (tmp_path / folder / 'training').mkdir(parents=True)
        (tmp_path / folder / 'training' / name).touch()
    dataset = dict(
        type='ADE20KDataset',
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    )
    return Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=dataset)))


def edit(tmp_path, **changes):
    path = tmp_path / 'annotations' / 'a.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_whole_data_sets_pass(coco, tmp_path):
    check_data(coco, 'train', 'val')


def test_whole_segmentation_sets_pass(ade):
    check_data(ade, 'train', 'val')


@pytest.mark.parametrize(
    'damage, reason',
    [
        (lambda root: (root / 'annotations' / 'a.json').unlink(), 'a.json does not exist'),
        (lambda root: (root / 'annotations' / 'a.json').write_text(''), 'a.json is not JSON'),
        (lambda root: (root / 'annotations' / 'a.json').write_text('{'), 'a.json is not JSON'),
        (lambda root: (root / 'annotations' / 'a.json').write_text('[]'), 'a.json has no images'),
        (lambda root: edit(root, images=[]), 'a.json has no images'),
        (lambda root: edit(root, annotations=[]), 'a.json has no annotations'),
        (lambda root: edit(root, categories=[]), 'a.json has no categories'),
        (lambda root: (root / 'train' / '1.jpg').unlink(), '1.jpg, the first image of a.json, is not in'),
        (lambda root: (root / 'train').rename(root / 'other'), 'train does not exist'),
    ],
)
def test_coco_damage_is_one_sentence_with_the_layout(coco, tmp_path, damage, reason):
    damage(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        check_data(coco, 'train')
    message = str(caught.value)
    assert "annotations/a.json in COCO's format and its images in train/" in message and '--data-root' in message
    assert '\n' not in message


def test_categories_that_the_data_set_does_not_know_are_refused(coco, tmp_path):
    edit(tmp_path, categories=[dict(id=1, name='shape')])
    with pytest.raises(UserError, match=r'no category of .*a.json \(shape\) is one of its classes \(person, '):
        check_data(coco, 'train')
    coco.train_dataloader.dataset.dataset.metainfo = dict(classes=('shape',))
    check_data(coco, 'train')


def test_annotations_may_lack_where_only_predictions_are_written(coco, tmp_path):
    edit(tmp_path, annotations=[])
    coco.test_dataloader = coco.train_dataloader
    coco.test_evaluator = dict(type='CocoMetric', format_only=True)
    check_data(coco, 'test')


def test_an_evaluator_without_its_file_is_refused(coco, tmp_path):
    coco.train_evaluator = dict(type='CocoMetric', ann_file=str(tmp_path / 'b.json'))
    with pytest.raises(UserError, match='annotation file .*b.json of train_evaluator does not exist'):
        check_data(coco, 'train')


@pytest.mark.parametrize(
    'damage, reason',
    [
        (lambda root: (root / 'images' / 'training').rename(root / 'images' / 'x'), 'images/training does not exist'),
        (lambda root: (root / 'annotations' / 'training').rename(root / 'x'), 'annotations/training does not exist'),
        (lambda root: (root / 'images' / 'training' / '1.jpg').unlink(), r'images/training has no images \*.jpg'),
        (
            lambda root: (root / 'annotations' / 'training' / '1.png').unlink(),
            '1 of 1 images have no label map, first 1.jpg',
        ),
    ],
)
def test_ade_damage_is_one_sentence_with_the_layout(ade, tmp_path, damage, reason):
    damage(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        check_data(ade, 'train')
    message = str(caught.value)
    assert 'images/training/*.jpg and, by the same names, label maps annotations/training/*.png' in message
    assert '\n' not in message


def test_the_suffixes_of_the_data_set_count(ade, tmp_path):
    ade.train_dataloader.dataset.update(img_suffix='.tif', seg_map_suffix='_labels.png')
    (tmp_path / 'images' / 'training' / '1.jpg').rename(tmp_path / 'images' / 'training' / '1.tif')
    (tmp_path / 'annotations' / 'training' / '1.png').rename(tmp_path / 'annotations' / 'training' / '1_labels.png')
    check_data(ade, 'train')


def test_data_sets_of_other_kinds_are_left_to_their_class():
    check_data(Config(dict(train_dataloader=dict(dataset=dict(type='ToyDataset')))), 'train', 'val')
