"""The report of a run: its table and its pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from demo.detector import draw
from demo.report import ap_table, draw_predictions, plot_curves


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp('report') / 'data', train=5, val=8, size=64) / 'coco'


@pytest.fixture(scope='module')
def annotation_file(data):
    return data / 'annotations' / 'instances_val2017.json'


@pytest.fixture
def perfect(annotation_file):
    keys = ('image_id', 'category_id', 'bbox', 'segmentation')
    truth = json.loads(annotation_file.read_text())['annotations']
    return [dict({key: item[key] for key in keys}, score=0.9) for item in truth]


def test_table_gives_boxes_and_masks_in_percent():
    names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    scores = {f'coco/{kind}_{name}': 0.5 for kind in ('bbox', 'segm') for name in names}
    lines = ap_table({**scores, 'coco/bbox_mAP_50': 0.876, 'coco/segm_mAP_l': -1.0}).splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[0] == ['', 'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl']
    assert cells[2] == ['boxes', '50.0', '87.6', *['50.0'] * 4]
    assert cells[3] == ['masks', *['50.0'] * 5, '-']


def test_table_without_a_single_prediction_gives_zeros():
    assert ap_table({}).count('0.0') == 12


def test_curves_are_plotted_from_the_logged_values(tmp_path):
    lines = [dict(lr=1e-3, loss=5 / step, loss_cls=1 / step, step=step, iter=step) for step in range(10, 60, 10)]
    lines += [{'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.5, 'step': 50}]
    (tmp_path / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    plot_curves(tmp_path / 'scalars.json', tmp_path / 'curves.png')
    with Image.open(tmp_path / 'curves.png') as image:
        assert image.format == 'PNG' and image.width > 800
        assert len(np.unique(np.asarray(image.convert('L')))) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ['curves.png', 'scalars.json']


def test_predictions_are_drawn_where_they_are(data, annotation_file, perfect, tmp_path):
    """Confident predictions change the lower half alone; doubtful ones are not drawn."""
    pictures = []
    for score in (0.9, 0.1):
        (tmp_path / 'results.json').write_text(json.dumps([dict(item, score=score) for item in perfect]))
        draw_predictions(
            annotation_file, data / 'val2017', tmp_path / 'results.json', tmp_path / 'predictions.png', count=3
        )
        pictures.append(np.asarray(Image.open(tmp_path / 'predictions.png').convert('RGB')))
    changed = (pictures[0] != pictures[1]).any((1, 2))
    middle = len(changed) // 2
    assert changed[middle:].sum() > 50
    assert not changed[: int(0.9 * middle)].any()
