"""A large image in tiles: each object once, in the image's pixels."""

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from PIL import Image

from mmengine_overlock.predict import Predictor
from tests.mmengine_overlock.predict.conftest import blots

HEIGHT, WIDTH, TILE = 300, 500, 128
# Boxes of objects by label. Tiles end at multiples of 128 - 25 pixels, with as many between them.
OBJECTS = {
    'inside one tile': (0, (10, 20, 50, 60)),
    'across a border': (0, (90, 30, 135, 70)),
    'across a corner': (1, (190, 90, 235, 135)),
    'larger than a tile': (0, (260, 60, 470, 280)),
    'beside another': (1, (135, 30, 175, 70)),
}


class Finder(torch.nn.Module):
    """A detector of what is drawn, in the place of a trained one: the more of an object it sees, the surer it is."""

    def test_step(self, data):
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            # Blue comes first; objects have the blue value 100 + label.
            boxes, scores, labels, masks = [torch.zeros(0, 4)], [], [], [torch.zeros(0, *image.shape[1:], dtype=bool)]
            for label in range(2):
                count, parts, stats, _ = cv2.connectedComponentsWithStats(
                    (image[0] == 100 + label).numpy().astype('u1')
                )
                for part in range(1, count):
                    x, y, width, height, area = stats[part].tolist()
                    boxes.append(torch.tensor([[x, y, x + width, y + height]]).float())
                    scores.append(1 - 1 / (1 + area / 100))
                    labels.append(label)
                    masks.append(torch.from_numpy(parts == part)[None])
            sample.pred_instances = InstanceData(
                bboxes=torch.cat(boxes),
                scores=torch.tensor(scores),
                labels=torch.tensor(labels, dtype=torch.int64),
                masks=torch.cat(masks),
            )
        return data['data_samples']


@pytest.fixture
def finder(checkpoints):
    predictor = Predictor(checkpoints['detector'], device='cpu', score=0.3, tile=TILE, batch=3)
    predictor.model, predictor.pipeline = Finder(), predictor.unscaled
    return predictor


def scene():
    """The objects, each a rectangle with a hole."""
    pixels, masks = np.zeros((HEIGHT, WIDTH, 3), np.uint8), []
    for label, (x1, y1, x2, y2) in OBJECTS.values():
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[y1:y2, x1:x2] = True
        mask[y1 + 10 : y1 + 15, x1 + 10 : x1 + 15] = False
        pixels[mask] = 100 + label
        masks.append(mask)
    return pixels, masks


def test_an_object_across_a_tile_border_comes_out_once_with_its_whole_mask(finder):
    pixels, masks = scene()
    found = finder([pixels])[0].pred_instances
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    boxes = [tuple(map(int, box)) for box in found.bboxes.tolist()]
    assert sorted(zip(found.labels.tolist(), boxes, strict=True)) == sorted(OBJECTS.values())
    order = [boxes.index(box) for _, box in OBJECTS.values()]
    assert np.array_equal(found.masks[order].numpy(), masks)


def test_nothing_in_any_tile_is_no_object(finder):
    found = finder([np.zeros((HEIGHT, WIDTH, 3), np.uint8)])[0].pred_instances
    assert (
        found.bboxes.shape == (0, 4) and found.masks.shape == (0, HEIGHT, WIDTH) and found.labels.dtype == torch.int64
    )


def test_stray_boxes_of_low_scores_are_not_joined(finder):
    pixels, _ = scene()
    finder.score = 0.0
    boxes = finder([pixels])[0].pred_instances.bboxes.tolist()
    assert {tuple(map(int, box)) for box in boxes} >= {box for _, box in OBJECTS.values()}


def test_few_tiles_are_in_memory_at_a_time(finder, monkeypatch):
    waiting = []
    prepare, run = finder.pipeline, finder.model.test_step
    finder.pipeline = lambda item: waiting.append(item) or prepare(item)

    def count(data):
        # One more was looked at for its size.
        assert len(waiting) <= finder.batch + 1
        del waiting[: len(data['inputs'])]
        return run(data)

    monkeypatch.setattr(finder.model, 'test_step', count)
    finder([scene()[0]])
    assert not waiting


@pytest.mark.parametrize('kind', ['detector', 'segmenter'])
def test_an_image_that_fits_in_a_tile_is_predicted_as_without_tiles(kind, checkpoints):
    image = blots(96, 128)
    tiled, whole = (Predictor(checkpoints[kind], device='cpu', tile=tile)([image])[0] for tile in (128, None))
    name = 'pred_instances' if kind == 'detector' else 'pred_sem_seg'
    for key, value in whole.get(name).items():
        assert torch.equal(tiled.get(name).get(key), value)


def test_windows_of_a_segmenter_are_those_of_mmseg_at_the_size_of_the_image(checkpoints, tmp_path):
    from mmseg.apis import MMSegInferencer

    checkpoint = checkpoints['segmenter']
    config = tmp_path / 'slide.py'
    config.write_text(
        f"_base_ = '{checkpoint.with_suffix('.py')}'\n"
        "model = dict(test_cfg=dict(mode='slide', crop_size=(96, 96), stride=(77, 77)))\n"
        "pipeline = [dict(type='LoadImageFromFile'), dict(type='ResizeToMultiple', size_divisor=32, "
        "interpolation='bicubic'), dict(type='PackSegInputs')]\n"
        'test_dataloader = dict(dataset=dict(pipeline=pipeline))\n'
    )
    image = tmp_path / 'image.png'
    Image.fromarray(blots(130, 200)).save(image)
    truth = MMSegInferencer(str(config), str(checkpoint), device='cpu')(str(image), return_datasamples=True)
    predictor = Predictor(checkpoint, device='cpu', tile=96)
    _, sample = next(predictor.predict(image))
    torch.testing.assert_close(sample.seg_logits.data, truth.seg_logits.data, rtol=1e-4, atol=1e-4)
    assert predictor.model.test_cfg.mode == 'whole'


def test_tiles_are_an_option(checkpoints, tmp_path, run_tool):
    image = tmp_path / 'image.png'
    Image.fromarray(blots(130, 200)).save(image)
    options = ('--checkpoint', checkpoints['detector'], '--out', tmp_path / 'out', '--tile', 96, '--score', 0)
    code, out, error = run_tool('predict', image, *options)
    assert code == 0 and out.startswith('1 images predicted, ')
    assert 'slice' not in error.lower()
