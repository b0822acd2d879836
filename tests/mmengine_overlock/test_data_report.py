"""`overlock data`: what a data set has, as text, JSON and HTML."""

import base64
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mmengine_overlock.data import check_data, files
from mmengine_overlock.data.pictures import choose
from mmengine_overlock.data.report import columns, report_config, report_folder
from mmengine_overlock.data.report_html import html
from mmengine_overlock.data.statistics import Statistics
from overlock.cli import main
from overlock.utils.errors import UserError
from tests.mmengine_overlock.data_sets import annotation, write_coco, write_image, write_map

DATA = Path(os.environ.get('OVERLOCK_DATA', 'not set'))
NAMES = ('猫 <cat>', 'Hündin & Co', 'پرنده')
WIDTH, HEIGHT = 240, 200


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('OVERLOCK_CACHE', str(tmp_path / 'cache'))


def rle(x, y, width, height):
    """An uncompressed run-length encoding of a rectangle: columns, from the top."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y : y + height, x : x + width] = True
    changes = np.flatnonzero(np.diff(mask.T.ravel())) + 1
    return dict(size=[HEIGHT, WIDTH], counts=np.diff([0, *changes, mask.size]).tolist())


@pytest.fixture
def coco(tmp_path):
    """Three images for training and two for validation; the last class has no box in the latter."""
    boxes = [
        annotation(1, (0, 0, 31, 33), image_id=1, category_id=1),  # 1023 pixels
        annotation(2, (0, 0, 32, 32), image_id=1, category_id=1),
        annotation(3, (100, 60, 96, 96), image_id=1, category_id=2, segmentation=rle(100, 60, 96, 96)),
        annotation(4, (20, 20, 40, 40), image_id=2, category_id=3),
        annotation(5, (20, 20, 90, 90), image_id=2, category_id=1, iscrowd=1, segmentation=rle(20, 20, 90, 90)),
    ]
    root = tmp_path / 'data'
    for split, count, used in (('train', 3, boxes), ('valid', 2, boxes[:3])):
        for number in range(1, count + 1):
            write_image(root / split / f'фото {number}.jpg', (WIDTH, HEIGHT))
        content = dict(
            images=[dict(id=n, file_name=f'фото {n}.jpg', width=WIDTH, height=HEIGHT) for n in range(1, count + 1)],
            annotations=used,
            categories=[dict(id=number, name=name) for number, name in enumerate(NAMES, 1)],
        )
        (root / split / '_annotations.coco.json').write_text(json.dumps(content, ensure_ascii=False), encoding='utf-8')
    return root


@pytest.fixture
def maps(tmp_path):
    """Two images and label maps for training and one for validation, of two named classes."""
    root = tmp_path / 'data'
    for split, values in (('train', [(0, 1, 255, 255), (0,)]), ('val', [(1, 1, 0, 1)])):
        for number, stripes in enumerate(values):
            write_image(root / 'images' / split / f'{number}.jpg')
            write_map(root / 'masks' / split / f'{number}.png', stripes)
    (root / 'classes.txt').write_text('\n'.join(NAMES[:2]), encoding='utf-8')
    return root


def test_boxes_are_counted_by_class_and_by_the_areas_of_coco(coco):
    report = report_folder(coco)
    content = json.loads(report.json())
    train = content['splits']['train']
    assert train['classes'] == {
        NAMES[0]: dict(boxes=2, small=1, medium=1, images=1),
        NAMES[1]: dict(boxes=1, large=1, images=1),
        NAMES[2]: dict(boxes=1, medium=1, images=1),
    }
    assert (train['images'], train['unlabeled'], train['crowds']) == (3, 1, 1)
    assert train['sizes'] == [[WIDTH, HEIGHT, 3]]
    assert content['usable'] and content['classes'] == list(NAMES)
    (lacking,) = [record for record in content['splits']['val']['findings'] if record['kind'] == 'unseen']
    assert lacking['items'] == [NAMES[2]]
    text = report.text()
    assert re.search(r'^  small +1 +1$', text, re.M) and re.search(r'^Hündin & Co +1 +1 +1 +- +- +1$', text, re.M)
    assert f'val, told: classes without annotations (1): {NAMES[2]}' in text and text.endswith('\nready to train')


def test_pixels_are_counted_by_class(maps):
    report = report_folder(maps)
    train, val = (outcome.statistics for outcome in report.outcomes.values())
    # Stripes of 10 of 40 columns, 30 high.
    assert train.classes == {NAMES[0]: dict(images=2, pixels=300 + 1200), NAMES[1]: dict(images=1, pixels=300)}
    assert (train.ignored, val.ignored, val.classes[NAMES[1]]['pixels']) == (600, 0, 900)
    assert re.search(r'pixels without a class +25\.0% +0\.0%', report.text())
    assert re.search(r'Hündin & Co +1 +16\.67% +1 +75\.00%', report.text())


def test_what_is_broken_is_named_and_the_rest_reported(coco, capsys, tmp_path):
    (coco / 'train' / 'фото 2.jpg').write_bytes(b'')
    assert main(['data', str(coco), '--html', str(tmp_path / 'a.html'), '--json', str(tmp_path / 'a.json')]) == 1
    out = capsys.readouterr().out
    assert 'train, refused: files that cannot be decoded (1): фото 2.jpg is empty' in out
    assert 'not ready: correct what is refused' in out and re.search(r'boxes +4 +3', out)
    assert not json.loads((tmp_path / 'a.json').read_text(encoding='utf-8'))['usable']
    page = (tmp_path / 'a.html').read_text(encoding='utf-8')
    assert 'фото 2.jpg is empty' in page and 'фото 1.jpg: ' in page


def test_json_is_printed_alone(coco, capsys):
    assert main(['data', str(coco), '--json', '-']) == 0
    assert json.loads(capsys.readouterr().out)['splits']['val']['images'] == 2


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['nowhere'], 'nowhere is not a folder. The configuration nowhere does not exist'),
        (['.'], 'has no images with label maps for train'),
        (['.', '--data-root', '.'], '--data-root is for a configuration'),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(['data', *arguments])
    assert caught.value.code == 2 and said in capsys.readouterr().err


class Page(HTMLParser):
    """Collects the tags of a page, and holds that they are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def pixels(link):
    content = base64.b64decode(link.removeprefix('data:image/jpeg;base64,'))
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)


def test_the_page_stands_alone_and_its_boxes_and_masks_lie_on_the_objects(coco):
    text = html(report_folder(coco))
    tags = Page(text).tags
    assert not {'script', 'link', 'iframe'} & {tag for tag, _ in tags}
    links = [value for _, attributes in tags for key, value in attributes.items() if key in ('href', 'src')]
    assert len(links) == 3 and all(link.startswith('data:image/jpeg;base64,') for link in links)
    assert '猫 &lt;cat&gt;' in text and '<cat>' not in text
    boxes = [
        [float(attributes[key]) for key in ('x', 'y', 'width', 'height')] for tag, attributes in tags if tag == 'rect'
    ]
    # Of the image with three boxes, in train and val, the large one is below the others.
    assert boxes.count([100, 60, 96, 96]) == 2 and boxes.count([0, 0, 31, 33]) == 2
    assert [attributes['d'] for tag, attributes in tags if tag == 'path'].count('M0 0 32 0 32 32 0 32Z') == 2
    # A run-length encoding is painted: noise of all values becomes half the color.
    image = next(pixels(link) for link in links if pixels(link)[60:156, 100:196].mean() < 125)
    assert image.shape[:2] == (HEIGHT, WIDTH)


def test_label_maps_lie_over_their_images_with_a_key(maps):
    report = report_folder(maps)
    text = html(report)
    tags = Page(text).tags
    drawn = [pixels(attributes['src']) for tag, attributes in tags if tag == 'img']
    assert len(drawn) == 3
    palette = np.array(report.cfg.train_dataloader.dataset.metainfo.palette)
    whole = next(image for image in drawn if np.ptp(image.mean((0, 2))) < 40)
    # A map of the first class alone: half of the noise and half of its color.
    assert np.abs(whole.mean((0, 1))[::-1] - (127.5 + palette[0]) / 2).max() < 4
    assert f'background:rgb{tuple(palette[0].tolist())}' in text.replace('&#x27;', '')


def test_pictures_show_every_class_first():
    shown = {f'{number}.jpg': ['person'] for number in range(100)} | {'cat.jpg': ['cat'], 'none.jpg': []}
    chosen = choose(shown, 3)
    assert 'cat.jpg' in chosen[:2] and len(chosen) == 3 and chosen == choose(shown, 3)
    assert 'none.jpg' not in choose(shown, 200)


def test_a_second_report_reads_no_image(coco, monkeypatch):
    first = report_folder(coco)
    monkeypatch.setattr(files, 'read_image', lambda *arguments, **options: pytest.fail('read again'))
    assert report_folder(coco).json() == first.json()


def test_a_configuration_is_reported_and_stays(tmp_path):
    (tmp_path / 'data').mkdir()
    cfg = write_coco(tmp_path / 'data')
    cfg.val_dataloader = cfg.test_dataloader = dict(cfg.train_dataloader)
    path = tmp_path / 'data' / 'annotations' / 'a.json'
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | dict(categories=content['categories'][::-1])))
    before = cfg.to_dict()
    report = report_config(cfg)
    assert list(report.outcomes) == ['train', 'val'] and 'train, repaired: categories in another' in report.text()
    assert cfg.to_dict() == before
    assert html(report).count('<figure>') == 6
    with pytest.raises(UserError, match='has no data set'):
        report_config(Config(dict(train_dataloader=dict(dataset=dict(type='ToyDataset')))))


def test_a_run_tells_in_a_line_what_it_will_see(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr('mmengine_overlock.data.tell', lambda message, *arguments: told.append(message))
    check_data(write_coco(tmp_path), 'train')
    line = 'The train data set: 3 images of 40x30, 3 boxes of 3 classes (100% small, 0% medium, 0% large).'
    assert told == [line]
    merged = Statistics(2, 1, dict(a=dict(images=1, pixels=30), b={}), [[8, 4, 2]], 0, 10)
    merged += Statistics(1, 0, dict(a=dict(images=1, pixels=20)), [[8, 4, 1]])
    assert str(merged) == '3 images of 8x4, 1 without labels, 1 of 2 classes (17% of the pixels have none)'
    assert merged.sizes == [[8, 4, 3]]


def test_columns_stand_below_each_other_in_any_script():
    lines = columns([['class', 'n'], ['猫', '1'], ['e\u0301', '10']])
    assert lines == ['class   n', '猫      1', 'e\u0301      10']


@pytest.mark.skipif(not DATA.is_dir(), reason='OVERLOCK_DATA names no folder')
def test_photographs_are_counted_as_their_files_say():
    report = report_folder(DATA / 'coco_tiny')
    for split, outcome in report.outcomes.items():
        content = json.loads((DATA / 'coco_tiny' / 'annotations' / f'instances_{split}2017.json').read_text())
        boxes = [item for item in content['annotations'] if not item['iscrowd']]
        assert outcome.statistics.total('boxes') == len(boxes)
        assert outcome.statistics.total('small') == sum(item['area'] < 32**2 for item in boxes)
        assert outcome.statistics.total('large') == sum(item['area'] >= 96**2 for item in boxes)
        assert outcome.statistics.crowds == len(content['annotations']) - len(boxes)
    assert Page(html(report)).tags
