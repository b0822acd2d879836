"""What is found in folders of data as people have them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmengine_overlock.data.categories import leave_out_doubles
from mmengine_overlock.data.find_coco import find_coco
from mmengine_overlock.data.find_masks import find_masks
from mmengine_overlock.data.report import report_folder
from overlock.utils.errors import UserError
from tests.mmengine_overlock.data_sets import annotation, write_image, write_map
from tests.testing import ROOT

NAMES = {7: '猫 cat', 3: 'Hund', 900: 'پرنده'}
UNLABELED = ('image_info_test2017', 'image_info_test-dev2017')
REAL = os.environ.get('OVERLOCK_DATA')


def coco(names=NAMES, masks=True, images=('1.jpg', '2.jpg', '3.jpg')):
    """An annotation file with a box of each category, on an image of its own."""
    boxes = [
        annotation(place, image_id=place, category_id=number, **({} if masks else {'segmentation': []}))
        for place, number in enumerate(names, 1)
    ]
    return dict(
        images=[dict(id=place, file_name=name, width=40, height=30) for place, name in enumerate(images, 1)],
        annotations=boxes[: len(images)],
        categories=[dict(id=number, name=name, supercategory='animal') for number, name in names.items()],
    )


def write(root, files, image_folders, **more):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(coco(**more), ensure_ascii=False), encoding='utf-8')
    for folder in image_folders:
        for image in more.get('images', ('1.jpg', '2.jpg', '3.jpg')):
            write_image(root / folder / Path(image).name)
    return root


@pytest.mark.parametrize(
    ('files', 'folders', 'expected'),
    [
        (['annotations/instances_train2017.json', 'annotations/instances_val2017.json'], ['train2017', 'val2017'], 0),
        (['train/_annotations.coco.json', 'valid/_annotations.coco.json'], ['train', 'valid'], 0),
        (['annotations/train.json', 'annotations/val.json'], ['images/train', 'images/val'], 0),
        (['annotations_train.json', 'annotations_validation.json'], ['images'], 'images'),
        (
            [f'annotations/{name}.json' for name in ('instances_train', 'captions_train', *UNLABELED, 'instances_val')],
            ['train', 'val', 'backup'],
            0,
        ),
    ],
)
def test_coco_layouts_are_found_by_where_the_images_exist(tmp_path, files, folders, expected):
    found = find_coco(write(tmp_path, files, folders))
    images = [str(part.images.relative_to(tmp_path)) for part in found.parts.values()]
    assert images == ([expected] * 2 if expected else folders[:2])
    assert [str(part.labels.relative_to(tmp_path)) for part in found.parts.values()] == [files[0], files[-1]]
    assert found.classes == ('Hund', '猫 cat', 'پرنده')
    assert found.masks and not found.ordered and not found.remarks and found.parts['train'].count == 3


def test_file_names_with_folders_and_labels_of_a_test_split_are_found(tmp_path):
    files = [f'{split}/_annotations.coco.json' for split in ('train', 'valid', 'test')]
    write(tmp_path, files, ['train/images', 'valid/images', 'test/images'], images=('images/1.jpg', 'images\\2.jpg'))
    found = find_coco(tmp_path)
    assert found.dataset('test')['ann_file'] == 'test/_annotations.coco.json'
    assert found.dataset('test')['data_prefix'] == dict(img='test')
    (tmp_path / files[2]).write_text('{')
    assert find_coco(tmp_path).remarks[0].startswith(f'No test split, val is tested: {tmp_path / files[2]} is not JSON')
    shutil.rmtree(tmp_path / 'test')
    assert find_coco(tmp_path).dataset('test') == find_coco(tmp_path).dataset('val')


def test_a_supercategory_that_is_exported_as_category_is_no_class(tmp_path):
    files = ['train/_annotations.coco.json', 'valid/_annotations.coco.json']
    write(tmp_path, files, ['train', 'valid'], names={2: 'dog', 1: 'cat'}, masks=False)
    for file in files:
        content = json.loads((tmp_path / file).read_text())
        content['categories'].append(dict(id=0, name='animal', supercategory='none'))
        (tmp_path / file).write_text(json.dumps(content))
    found = find_coco(tmp_path)
    assert found.classes == ('cat', 'dog') and not found.masks
    assert found.remarks[0].startswith('No class: animal')
    assert found.remarks[1] == 'Boxes alone: 2 of 2 annotations of train have no mask.'
    content['annotations'][0]['category_id'] = 0
    (tmp_path / files[1]).write_text(json.dumps(content))
    assert find_coco(tmp_path).classes == ('animal', 'cat', 'dog')


def test_one_file_is_split_as_the_docs_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [f'{number}.jpg' for number in range(20)]
    write(tmp_path, ['annotations/all.json'], ['images'], names={n: f'name {n}' for n in range(1, 21)}, images=images)
    code = re.search(r'```python\n(.*?)```', (ROOT / 'docs/own_data.md').read_text(), re.DOTALL)[1]
    subprocess.run([sys.executable, '-c', code], check=True)
    found = find_coco(tmp_path)
    assert [part.count for part in found.parts.values()] == [18, 2] and len(found.classes) == 20


def test_a_supercategory_of_the_name_of_a_class_is_none(tmp_path):
    files = ['train/_annotations.coco.json', 'valid/_annotations.coco.json']
    write(tmp_path, files, ['train', 'valid'], names={1: 'cat'})
    assert find_coco(tmp_path).ordered
    for file in files:
        content = json.loads((tmp_path / file).read_text())
        content['categories'].insert(0, dict(id=0, name='cat', supercategory='none'))
        (tmp_path / file).write_text(json.dumps(content))
    found = find_coco(tmp_path)
    # The check repairs the files, and without it mmdet counts two classes.
    assert found.classes == ('cat',) and not found.ordered


def test_of_categories_of_one_name_without_annotations_the_last_one_stays(tmp_path):
    write(tmp_path, ['train.json', 'val.json'], ['images'], names={1: 'dog', 2: 'cat'}, images=['1.jpg'])
    for file in ('train.json', 'val.json'):
        content = json.loads((tmp_path / file).read_text())
        content['categories'].insert(0, dict(id=0, name='cat'))
        (tmp_path / file).write_text(json.dumps(content))
    assert find_coco(tmp_path).classes == ('dog', 'cat')
    unlabeled = dict(categories=[dict(id=0, name='cat'), dict(id=1, name='cat'), dict(id=2), dict(id=3)])
    assert leave_out_doubles(unlabeled) == ['cat']
    assert unlabeled['categories'] == [dict(id=1, name='cat'), dict(id=2), dict(id=3)]


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (lambda root, train, val: shutil.rmtree(root), 'does not exist'),
        (
            lambda root, train, val: val.unlink(),
            'no annotation file for val: .* got annotations/train.json; validation needs images of its own: move a',
        ),
        (lambda root, train, val: shutil.copy(train, train.with_name('b_train.json')), '2 annotation files for train'),
        (lambda root, train, val: train.write_text('['), 'is not JSON'),
        (lambda root, train, val: shutil.rmtree(root / 'train'), 'is in no folder of .* for train or for all'),
        (lambda root, train, val: shutil.copytree(root / 'val', root / 'x/val'), r'2 folders \(val, x/val\)'),
        (
            lambda root, train, val: val.write_text(json.dumps(coco({1: 'katze'}))),
            'annotations of katze, which .* lack',
        ),
        (lambda root, train, val: train.write_text(json.dumps(coco({1: 'a', 2: 'a'}))), "'a' as two categories"),
        (lambda root, train, val: train.write_text(json.dumps(coco({None: 'a'}))), 'without an id or a name'),
    ],
)
def test_a_coco_folder_that_cannot_be_used_is_told_in_a_sentence(tmp_path, damage, said):
    root = write(tmp_path / 'data', ['annotations/train.json', 'annotations/val.json'], ['train', 'val'])
    damage(root, root / 'annotations/train.json', root / 'annotations/val.json')
    with pytest.raises(UserError, match=said):
        find_coco(root)


def write_masks(root, folders=('images/{}', 'masks/{}'), splits=('train', 'val'), values=(0, 1, 3, 255), ending='.png'):
    for split in splits:
        for name in ('1', '10'):
            write_image(root / folders[0].format(split) / f'{name}.jpg')
            write_map(root / folders[1].format(split) / f'{name}{ending}', values)
    return root


@pytest.mark.parametrize(
    ('folders', 'splits', 'ending'),
    [
        (('images/{}', 'annotations/{}'), ('training', 'validation'), '.png'),
        (('{}/images', '{}/masks'), ('train', 'valid'), '_mask.png'),
        (('img_dir/{}', 'ann_dir/{}'), ('train', 'val'), '.png'),
        (('data/{}/images', 'data/{}/labels'), ('train', 'val'), '_label.bmp'),
    ],
)
def test_label_maps_are_found_and_named_by_value(tmp_path, folders, splits, ending):
    found = find_masks(write_masks(tmp_path, folders, splits, ending=ending))
    for part, split in zip(found.parts.values(), splits, strict=True):
        assert (part.images, part.labels) == tuple(tmp_path / folder.format(split) for folder in folders)
    assert [part.count for part in found.parts.values()] == [2, 2]
    assert found.suffixes == ('.jpg', ending) and not found.reduce_zero_label
    assert found.classes == ('class 0', 'class 1', 'class 2', 'class 3')
    assert found.remarks[0].startswith('Classes are named by value')


@pytest.mark.parametrize(
    ('file', 'text', 'zero'),
    [
        ('classes.txt', '\ufeff背景\nroad sign\nсобака\n\n', False),
        ('labels.json', '["背景", "road sign", "собака"]', False),
        ('classes.json', '{"2": "road sign", "1": "背景", "3": "собака"}', True),
        ('objectInfo150.txt', 'Idx\tRatio\tName\n1\t.1\t背景\n2\t.2\troad sign\n3\t.1\tсобака\n', True),
    ],
)
def test_names_of_classes_come_from_a_file_by_value(tmp_path, file, text, zero):
    (write_masks(tmp_path) / file).write_text(text, encoding='utf-8')
    found = find_masks(tmp_path)
    assert found.classes == ('背景', 'road sign', 'собака')
    assert found.reduce_zero_label == found.dataset('train')['reduce_zero_label'] == zero
    assert len(found.remarks) == zero


def test_label_maps_beside_their_images_are_found_as_roboflow_exports_them(tmp_path):
    write_masks(tmp_path, ('{}', '{}'), ('train', 'valid'), values=(0, 1, 2), ending='_mask.png')
    for split in ('train', 'valid'):
        (tmp_path / split / '_classes.csv').write_text('Pixel Value, Class\n0, background\n1, "road, wet"\n2, 木\n')
    found = find_masks(tmp_path)
    assert found.classes == ('background', 'road, wet', '木') and not found.reduce_zero_label
    assert found.suffixes == ('.jpg', '_mask.png') and [part.count for part in found.parts.values()] == [2, 2]
    assert found.dataset('test')['data_prefix'] == dict(img_path='valid', seg_map_path='valid')
    report = report_folder(tmp_path)
    assert report.usable and report.outcomes['val'].statistics.images == 2
    names = tmp_path / 'valid/_classes.csv'
    text = names.read_text()
    for other in (text.replace('木', 'tree'), text.replace('1, "road, wet"\n', '')):
        names.write_text(other)
        with pytest.raises(UserError, match='valid/_classes.csv (has other values or names than train|names the)'):
            find_masks(tmp_path)
    names.write_text(text)
    for image in tmp_path.glob('train/*.jpg'):
        image.rename(image.with_suffix('.png'))
    with pytest.raises(UserError, match='images and label maps of one suffix, .png, .* move them to images and masks'):
        find_masks(tmp_path)
    # As that message says; files of names that stay behind do not matter.
    for split in ('train', 'valid'):
        for file in [*(tmp_path / split).glob('*')]:
            if file.name != '_classes.csv':
                folder = tmp_path / ('masks' if '_mask' in file.name else 'images') / split
                folder.mkdir(parents=True, exist_ok=True)
                file.rename((folder / file.name).with_suffix('.png'))
        shutil.copy(tmp_path / split / '_classes.csv', tmp_path / 'masks' / split)
    assert find_masks(tmp_path).classes == found.classes
    # Without its heading.
    for file in tmp_path.glob('masks/*/_classes.csv'):
        file.write_text(text.partition('\n')[2])
    assert find_masks(tmp_path).classes == found.classes


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (
            lambda root: shutil.rmtree(root / 'masks/val'),
            'no images with label maps for val: expected .*; got images.*; validation needs images of its own: move a',
        ),
        (lambda root: shutil.copytree(root / 'masks', root / 'labels'), 'several folders of images or label maps'),
        (lambda root: write_image(root / 'images/val/a.png', format='PNG'), '2 .jpg, 1 .png'),
        (lambda root: write_map(root / 'masks/train/1.png', mode='RGB'), r'several channels \(1.png\)'),
        (lambda root: write_masks(root, values=(0, 255)), 'values of the label maps are 0, 255, which are no classes'),
        (lambda root: write_masks(root, values=(0, 128, 200)), 'are 0, 128, 200, which are no classes'),
        (lambda root: write_masks(root, values=(255,)), 'are 255, which'),
        (lambda root: (root / 'classes.txt').write_text('a\na'), "name 'a' twice"),
        (lambda root: (root / 'classes.txt').write_text('a'), r'have one class \(a\), expected two or more'),
        (lambda root: (root / 'classes.txt').write_text(''), 'names the values none'),
        (lambda root: (root / 'classes.txt').write_text('a\n\nb'), 'line 2 is empty'),
        (lambda root: (root / 'classes.txt').write_text('1 wall\n2: tree\n3,car'), 'lines begin with numbers'),
        (lambda root: (root / 'classes.json').write_text('{"0": "a", "2": "b"}'), 'names the values 0, 2'),
        (lambda root: (root / 'classes.json').write_text('{"a": 0}'), 'cannot be read'),
        (lambda root: (root / 'classes.json').write_text('[{"id": 1, "name": "a"}]'), "'a'} is not a name"),
        (
            lambda root: (
                [
                    shutil.copy(path, path.with_name(f'{path.stem}_{kind}.png'))
                    for path in sorted(root.glob('masks/*/*.png'))
                    for kind in 'ab'
                ]
                + [path.unlink() for path in sorted(root.glob('masks/*/1*.png')) if '_' not in path.name]
            ),
            'several label maps for each image, 1_a.png, 1_b.png, expected one',
        ),
        (lambda root: [(root / f'{name}.txt').write_text('a') for name in ('classes', 'labels')], 'several files'),
        (
            lambda root: [(root / f'masks/val/{n}.png').rename(root / f'masks/val/x{n}') for n in (1, 10)],
            'no label map',
        ),
        (lambda root: [(root / f'masks/val/{n}.png').rename(root / f'masks/val/{n}.bmp') for n in (1, 10)], 'the same'),
    ],
)
def test_a_folder_of_maps_that_cannot_be_used_is_told_in_a_sentence(tmp_path, damage, said):
    damage(write_masks(tmp_path))
    with pytest.raises(UserError, match=said):
        find_masks(tmp_path)


def test_colors_of_many_classes_differ(tmp_path):
    (write_masks(tmp_path) / 'classes.txt').write_text('\n'.join(f'name {number}' for number in range(150)))
    palette = np.array(find_masks(tmp_path).metainfo['palette'])
    assert palette.shape == (150, 3) and palette.min() >= 0 and palette.max() <= 255
    assert len(np.unique(palette, axis=0)) == 150


@pytest.mark.skipif(not REAL, reason='OVERLOCK_DATA names no folder')
def test_real_photographs_are_found():
    found = find_coco(f'{REAL}/coco_tiny')
    assert found.classes[:2] == ('person', 'bicycle') and len(found.classes) == 80 and found.masks
    found = find_masks(f'{REAL}/ade_tiny')
    with Image.open(next(found.parts['val'].labels.glob('*.png'))) as image:
        assert len(found.classes) > max(set(image.tobytes()) - {255})
