"""Predictions are those of the toolboxes' own inferencers, for any batch, and of use to other packages."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import overlock
from mmengine_overlock.predict import Predictor
from overlock.utils.errors import UserError
from tests.mmengine_overlock.predict.conftest import blots

# Of BatchNorms folded into convolutions.
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture
def turned(tmp_path):
    """A photograph that its EXIF turns by a quarter."""
    path = tmp_path / 'turned.jpg'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(blots(120, 200)).save(path, exif=exif, quality=95)
    return path


def test_boxes_and_masks_are_those_of_mmdets_inferencer(checkpoints, turned):
    from mmdet.apis import DetInferencer

    checkpoint = checkpoints['detector']
    inferencer = DetInferencer(str(checkpoint.with_suffix('.py')), str(checkpoint), device='cpu', show_progress=False)
    truth = inferencer(str(turned), return_datasamples=True, no_save_pred=True)['predictions'][0].pred_instances
    (_, sample), *_ = overlock.predict(turned, checkpoint, score=0, device='cpu')
    # Of equal scores either comes first: both in the order of labels.
    found, truth = (each[each.labels.argsort(stable=True)] for each in (sample.pred_instances, truth))
    # As the file says, it is upright: 200 rows.
    assert sample.ori_shape == (200, 120) and len(found) == len(truth) == 20
    for name in ('scores', 'bboxes'):
        torch.testing.assert_close(found[name], truth[name], **CLOSE)
    assert torch.equal(found.labels, truth.labels)
    assert found.masks.shape == (20, 200, 120)
    assert (found.masks == truth.masks).double().mean() > 0.9999


def test_label_maps_are_those_of_mmsegs_inferencer(checkpoints, turned):
    from mmseg.apis import MMSegInferencer

    checkpoint = checkpoints['segmenter']
    inferencer = MMSegInferencer(str(checkpoint.with_suffix('.py')), str(checkpoint), device='cpu')
    truth = inferencer(str(turned), return_datasamples=True)
    (_, sample), *_ = overlock.predict(turned, checkpoint, device='cpu')
    torch.testing.assert_close(sample.seg_logits.data, truth.seg_logits.data, **CLOSE)
    assert (sample.pred_sem_seg.data == truth.pred_sem_seg.data).double().mean() > 0.9999
    assert sample.pred_sem_seg.data.shape == (1, 200, 120)


@pytest.mark.parametrize('kind', ['detector', 'segmenter'])
def test_predictions_do_not_depend_on_the_batch(kind, checkpoints):
    images = [blots(64, 96, 0), blots(64, 96, 1), blots(96, 64, 2), blots(64, 96, 3)]
    alone = Predictor(checkpoints[kind], device='cpu')(images)
    together = Predictor(checkpoints[kind], device='cpu', batch=4)(images)
    for one, other in zip(alone, together, strict=True):
        if kind == 'detector':
            torch.testing.assert_close(one.pred_instances.bboxes, other.pred_instances.bboxes, **CLOSE)
        else:
            torch.testing.assert_close(one.seg_logits.data, other.seg_logits.data, **CLOSE)


def test_three_lines_of_python_give_what_supervision_takes(checkpoints, images):
    supervision = pytest.importorskip('supervision')
    with pytest.warns(UserWarning, match='could not be read: .*broken.jpg is not an image'):
        answers = [*overlock.predict(images, checkpoints['detector'], score=0, device='cpu')]
    assert [picture.source.name for picture, _ in answers] == ['a.png', 'überholt 木.jpg']
    picture, answer = answers[0]
    detections = supervision.Detections.from_mmdetection(answer)
    assert detections.mask.shape == (20, *picture.pixels.shape[:2]) and detections.mask.dtype == bool
    assert detections.xyxy.dtype == np.float32 and detections.class_id.dtype == int
    drawn = supervision.MaskAnnotator().annotate(picture.pixels.copy(), detections)
    assert (drawn != picture.pixels).any()


def test_boxes_below_the_score_are_left_out(checkpoints, images):
    every, some = (
        next(Predictor(checkpoints['detector'], device='cpu', score=score).predict(images / 'a.png'))[1].pred_instances
        for score in (0.0, 0.07)
    )
    assert len(some) == (every.scores >= 0.07).sum() < len(every)


def test_a_mistake_is_told_by_the_call_and_not_by_the_first_image(tmp_path):
    with warnings.catch_warnings(), pytest.raises(overlock.checkpoint.CheckpointError):
        Image.fromarray(blots(20, 20)).save(tmp_path / 'a.png')
        overlock.predict(tmp_path, tmp_path / 'missing.pth')


@pytest.mark.parametrize('device', ['gpu', 'cuda:99'])
def test_a_device_that_is_none_is_one_sentence(device, checkpoints):
    with pytest.raises(UserError, match=f'The device {device} cannot be used here .*; give cpu, or leave it out'):
        Predictor(checkpoints['segmenter'], device=device)


def test_tiles_without_sahi_are_one_sentence(checkpoints, monkeypatch):
    monkeypatch.setattr('mmengine_overlock.predict.predictor.find_spec', lambda name: None)
    with pytest.raises(UserError, match='Tiles need sahi; install it with'):
        Predictor(checkpoints['detector'], device='cpu', tile=128)
    Predictor(checkpoints['segmenter'], device='cpu', tile=128)
