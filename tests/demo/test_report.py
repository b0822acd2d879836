"""The report of a run: its numbers are COCO's, its files are whole."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from demo.detector import draw
from demo.drawing import SCENE_CLASSES as CLASSES
from demo.report import MEASURES, ap_table, average_precision, draw_predictions, plot_curves


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


@pytest.fixture
def measure(annotation_file, tmp_path):
    """Give the rows of the table for predictions."""

    def rows(results):
        path = tmp_path / 'results.json'
        path.write_text(json.dumps(results))
        return average_precision(annotation_file, path, path)

    return rows


def value(row, kind, name):
    return row[kind][MEASURES.index(name)]


def test_perfect_predictions_have_an_ap_of_one(measure, perfect):
    rows = measure(perfect)
    assert list(rows) == ['all', *CLASSES]
    for row in rows.values():
        assert value(row, 'box', 'AP') == value(row, 'mask', 'AP50') == pytest.approx(1)
        assert value(row, 'box', 'APl') == -1


def test_one_missed_class_costs_its_share(measure, perfect):
    rows = measure([item for item in perfect if item['category_id'] != 1])
    assert value(rows[CLASSES[0]], 'box', 'AP50') == 0
    assert value(rows['all'], 'box', 'AP50') == pytest.approx(1 - 1 / len(CLASSES))


def test_boxes_shifted_by_a_quarter_pass_only_the_low_threshold(measure, perfect):
    for item in perfect:
        x, y, width, height = item['bbox']
        item['bbox'] = [x + width / 4, y, width, height]
    row = measure(perfect)['all']
    assert value(row, 'box', 'AP50') > 0.9
    assert value(row, 'box', 'AP75') < 0.1
    assert value(row, 'mask', 'AP75') == pytest.approx(1)


def test_no_predictions_have_an_ap_of_zero(measure):
    assert value(measure([])['all'], 'box', 'AP50') == 0


def test_the_table_agrees_with_cocoeval(annotation_file, measure, perfect):
    """Random scores and boxes: all classes together and one alone, each by an evaluation of its own."""
    rng = np.random.default_rng(0)
    for item in perfect:
        item['score'] = float(rng.uniform())
        item['bbox'] = (np.array(item['bbox']) + rng.uniform(-3, 3, 4)).tolist()
    rows = measure(perfect)
    truth = COCO(str(annotation_file))
    results = truth.loadRes([{key: item[key] for key in item if key != 'segmentation'} for item in perfect])
    for name, ids in (('all', truth.getCatIds()), (CLASSES[2], [3])):
        expected = COCOeval(truth, results, 'bbox')
        expected.params.catIds = ids
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
        np.testing.assert_allclose(rows[name]['box'], expected.stats[:6])


def test_markdown_has_a_line_a_class_in_percent(measure, perfect):
    lines = ap_table(measure(perfect)).splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[0][:7] == ['class', 'box AP', 'box AP50', 'box AP75', 'box APs', 'box APm', 'box APl']
    assert cells[2][:3] == ['all', '100.0', '100.0'] and cells[2][-1] == '-'
    assert [row[0] for row in cells[3:]] == list(CLASSES)


def test_curves_are_plotted_from_the_logged_values(tmp_path):
    lines = [dict(lr=1e-3, loss=5 / step, loss_cls=1 / step, step=step, iter=step) for step in range(10, 60, 10)]
    lines += [{'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.5, 'step': 50}]
    (tmp_path / 'scalars.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    plot_curves(tmp_path / 'scalars.json', tmp_path / 'curves.png')
    with Image.open(tmp_path / 'curves.png') as image:
        assert image.format == 'PNG' and image.width > 800
        assert len(np.unique(np.asarray(image.convert('L')))) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ['curves.png', 'scalars.json']


def test_an_empty_log_is_refused(tmp_path):
    (tmp_path / 'scalars.json').write_text('\n')
    with pytest.raises(ValueError, match='train first'):
        plot_curves(tmp_path / 'scalars.json', tmp_path / 'curves.png')


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
