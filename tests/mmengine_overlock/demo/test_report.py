"""The report of a run: its numbers are COCO's, its files are whole."""

import json

import numpy as np
import pytest
from PIL import Image

from mmengine_overlock.demo import report
from mmengine_overlock.demo.pictures import draw_predictions
from mmengine_overlock.demo.scenes import CLASSES
from mmengine_overlock.demo.shapes import draw
from overlock.utils.files import drafted


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return draw(tmp_path_factory.mktemp('report') / 'data', train=5, val=8, size=64) / 'coco'


@pytest.fixture
def annotation_file(data):
    return data / 'annotations' / 'instances_val2017.json'


@pytest.fixture
def perfect(annotation_file):
    keys = ('image_id', 'category_id', 'bbox', 'segmentation')
    truth = json.loads(annotation_file.read_text())['annotations']
    return [dict({key: item[key] for key in keys}, score=0.9) for item in truth]


def write(path, results):
    path.write_text(json.dumps(results))
    return path


def test_perfect_predictions_have_an_ap_of_one(annotation_file, perfect, tmp_path):
    path = write(tmp_path / 'results.json', perfect)
    table = report.ap_table(annotation_file, {'box': path, 'mask': path})
    assert list(table.rows) == ['all', *CLASSES]
    for row in table.rows.values():
        assert row['box']['AP'] == row['mask']['AP50'] == pytest.approx(1)
        assert np.isnan(row['box']['APl'])


def test_one_missed_class_costs_its_share(annotation_file, perfect, tmp_path):
    path = write(tmp_path / 'results.json', [item for item in perfect if item['category_id'] != 1])
    rows = report.ap_table(annotation_file, {'box': path}).rows
    assert rows[CLASSES[0]]['box']['AP50'] == 0
    assert rows['all']['box']['AP50'] == pytest.approx(1 - 1 / len(CLASSES))


def test_boxes_shifted_by_a_third_pass_only_the_low_threshold(annotation_file, perfect, tmp_path):
    for item in perfect:
        x, y, width, height = item['bbox']
        item['bbox'] = [x + width / 4, y, width, height]
    rows = report.ap_table(annotation_file, {'box': write(tmp_path / 'results.json', perfect)}).rows
    assert rows['all']['box']['AP50'] > 0.9
    assert rows['all']['box']['AP75'] < 0.1


def test_no_predictions_have_an_ap_of_zero(annotation_file, tmp_path):
    rows = report.ap_table(annotation_file, {'box': write(tmp_path / 'results.json', [])}).rows
    assert rows['all']['box']['AP50'] == 0


def test_table_agrees_with_cocoeval(annotation_file, perfect, tmp_path):
    """Random scores and boxes, both sides measured; also guards the order of sizes and thresholds."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    for item in perfect:
        item['score'] = float(rng.uniform())
        item['bbox'] = (np.array(item['bbox']) + rng.uniform(-3, 3, 4)).tolist()
    path = write(tmp_path / 'results.json', perfect)
    truth = COCO(str(annotation_file))
    expected = COCOeval(truth, truth.loadRes(str(path)), 'bbox')
    expected.evaluate()
    expected.accumulate()
    expected.summarize()
    row = report.ap_table(annotation_file, {'box': path}).rows['all']['box']
    measured = np.nan_to_num([row[measure] for measure in report.MEASURES], nan=-1)
    np.testing.assert_allclose(measured, expected.stats[:6])


def test_an_unknown_kind_of_result_is_refused(annotation_file, tmp_path):
    with pytest.raises(ValueError, match='box, mask, got boxes'):
        report.ap_table(annotation_file, {'boxes': tmp_path / 'results.json'})


def test_markdown_has_a_line_a_class_in_percent(annotation_file, perfect, tmp_path):
    path = write(tmp_path / 'results.json', perfect)
    lines = report.ap_table(annotation_file, {'box': path}).to_markdown().splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[0] == ['class', 'box AP', 'box AP50', 'box AP75', 'box APs', 'box APm', 'box APl']
    assert cells[2][:3] == ['all', '100.0', '100.0'] and cells[2][-1] == '-'
    assert [row[0] for row in cells[3:]] == list(CLASSES)


@pytest.fixture
def scalars(tmp_path):
    lines = [dict(lr=1e-3, loss=5 / step, loss_cls=1 / step, step=step, iter=step) for step in range(10, 60, 10)]
    lines += [{'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.5, 'step': 50}]
    path = tmp_path / 'scalars.json'
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


def test_curves_are_plotted_from_the_logged_values(scalars, tmp_path):
    records = report.read_scalars(scalars)
    assert len(records) == 6
    report.plot_curves(records, tmp_path / 'curves.png')
    with Image.open(tmp_path / 'curves.png') as image:
        assert image.format == 'PNG' and image.width > 800
        assert len(np.unique(np.asarray(image.convert('L')))) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ['curves.png', 'scalars.json']


def test_an_empty_log_is_refused(tmp_path):
    (tmp_path / 'scalars.json').write_text('\n')
    with pytest.raises(ValueError, match='train first'):
        report.read_scalars(tmp_path / 'scalars.json')


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'table.md'
    path.write_text('old')
    with pytest.raises(ZeroDivisionError), drafted(path) as (new,):
        new.write_text('half')
        1 / 0
    assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]


def test_predictions_are_drawn_where_they_are(data, annotation_file, perfect, tmp_path):
    """Confident predictions change the lower half alone; doubtful ones are not drawn."""
    pictures = []
    for score in (0.9, 0.1):
        for item in perfect:
            item['score'] = score
        results = write(tmp_path / 'results.json', perfect)
        draw_predictions(annotation_file, data / 'val2017', results, tmp_path / 'predictions.png', count=3)
        pictures.append(np.asarray(Image.open(tmp_path / 'predictions.png').convert('RGB')))
    changed = (pictures[0] != pictures[1]).any((1, 2))
    middle = len(changed) // 2
    assert changed[middle:].sum() > 50
    assert not changed[: int(0.9 * middle)].any()
