"""Pictures name classes in any language, and say it where they cannot."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData

from mmengine_overlock.predict.drawing import Drawing, find_font
from tests.mmengine_overlock.predict.conftest import blots

PALETTE = [[200, 0, 0], [0, 150, 0], [0, 0, 250]]


def segmented(labels):
    from mmseg.structures import SegDataSample

    return SegDataSample(pred_sem_seg=PixelData(data=torch.from_numpy(labels)[None]))


def test_a_legend_has_the_colors_of_the_classes_present_the_largest_first():
    pixels, labels = blots(120, 160), np.zeros((120, 160), np.int64)
    labels[:, :100] = 2
    drawn = Drawing(('Straße', 'absent', 'дорога'), PALETTE)(pixels, segmented(labels))
    assert drawn.shape[0] > 120 and drawn.shape[1] == 160
    legend = drawn[120:, :, ::-1].reshape(-1, 3).tolist()
    assert [0, 0, 250] in legend and [200, 0, 0] in legend and [0, 150, 0] not in legend
    assert legend.index([0, 0, 250]) < legend.index([200, 0, 0])
    # Half color, half image.
    np.testing.assert_allclose(drawn[60, 20], 0.5 * pixels[60, 20] + [125, 0, 0], atol=2)


def test_boxes_and_masks_are_drawn_with_names_and_scores():
    from mmdet.structures import DetDataSample

    pixels = np.full((120, 160, 3), 255, np.uint8)
    masks = torch.zeros(1, 120, 160, dtype=torch.bool)
    masks[0, 40:90, 40:120] = True
    found = InstanceData(
        bboxes=torch.tensor([[30.0, 30, 130, 100]]), scores=torch.tensor([0.9]), labels=torch.tensor([1])
    )
    plain = Drawing(('a', 'b', 'c'), PALETTE)(pixels, DetDataSample(pred_instances=found))
    assert (plain[60, 26:34] != 255).any() and (plain[60, 80] == 255).all()
    found.masks = masks
    masked = Drawing(('a', 'b', 'c'), PALETTE)(pixels, DetDataSample(pred_instances=found))
    assert masked.shape == pixels.shape and (masked[60, 80] != 255).any()
    # The name stands above the corner.
    named = Drawing(('a', 'жук', 'c'), PALETTE)(pixels, DetDataSample(pred_instances=found))
    assert (named[14:30, 30:90] != masked[14:30, 30:90]).any() and np.array_equal(named[32:], masked[32:])


def test_a_font_has_all_letters_of_a_name():
    assert find_font('Straße дорога').endswith('DejaVuSans.ttf')
    # A letter of STIX, which comes with matplotlib.
    assert 'STIX' in find_font('\u23b0')
    # Not assigned by Unicode: what has it is no font for people.
    assert find_font('a\u0378') is None


def test_names_that_no_font_has_are_numbers_and_that_is_said():
    drawing = Drawing(('tree', 'a\u0378', '\u0378'), PALETTE)
    assert drawing._names == ['tree', 'class 1', 'class 2']
    assert drawing.note.startswith('no font of this machine has the letters of a\u0378, \u0378: pictures name')
    assert Drawing(('tree',), None).note == ''


@pytest.mark.parametrize('count', [1, 150])
def test_a_legend_of_many_classes_fits_the_width(count):
    labels = np.arange(64 * 96).reshape(64, 96) % count
    drawn = Drawing([f'a class of number {i}' for i in range(count)], None)(blots(64, 96), segmented(labels))
    assert drawn.shape[1] == 96 and drawn.shape[0] > 64


def test_frames_of_a_video_have_one_size_for_any_number_of_classes():
    drawing = Drawing([f'a class of number {i}' for i in range(9)], None)
    few, many = (np.arange(64 * 96).reshape(64, 96) % count for count in (1, 9))
    sizes = {drawing(blots(64, 96), segmented(labels), rows=2).shape for labels in (few, many)}
    assert len(sizes) == 1
