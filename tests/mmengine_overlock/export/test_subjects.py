"""What is exported gives what the toolboxes give."""

import pytest
import torch

from mmengine_overlock.export.checks import compare_detections, iou
from mmengine_overlock.export.modules import Half, in_half, pad
from mmengine_overlock.export.subjects import make_subject
from overlock import OverLoCK
from overlock.utils.errors import UserError
from tests.mmengine_overlock.export.conftest import CLASSES
from tests.testing import TINY


def subject_of(small, kind, **options):
    config, checkpoint = small(kind)
    return make_subject(config, str(checkpoint), **options)


@pytest.mark.parametrize('kind', ['mask_rcnn', 'cascade', 'retinanet'])
@pytest.mark.parametrize('preprocessing', [False, True])
def test_detector_finds_what_mmdet_finds(kind, preprocessing, small, picture):
    subject = subject_of(small, kind, preprocessing=preprocessing)
    image = subject.read(picture)
    # Padded inside.
    assert (tuple(image.shape), subject.info['pad_size_divisor']) == ((1, 3, 143, 192), 1)
    found = [out[0] for out in subject.module(image)]
    truth = subject.reference(image)
    difference, same, count = compare_detections(found[:3], truth)
    assert same == count > 0
    assert difference < 1e-3
    batch = subject.module(torch.cat([image.flip(3), image]))
    for single, second in zip(found, batch, strict=True):
        torch.testing.assert_close(second[1], single, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('kind', ['mask_rcnn', 'cascade'])
def test_masks_pasted_into_their_boxes_are_those_of_mmdet(kind, small, picture):
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    from mmdet.structures import DetDataSample

    subject = subject_of(small, kind)
    image = subject.read(picture)
    height, width = image.shape[2:]
    with torch.no_grad():
        boxes, scores, _, masks = (out[0] for out in subject.module(image))
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(height, width),
                ori_shape=(height, width),
                batch_input_shape=(height, width),
                scale_factor=(1, 1),
            )
        )
        truth = subject.module.model.predict(pad(image, 32), [sample], rescale=False)[0].pred_instances
    count = len(truth)
    assert count and (scores >= 0).sum() == count
    pasted, _ = _do_paste_mask(masks[:count, None], boxes[:count], height, width, skip_empty=False)
    assert ((pasted >= subject.info['mask_threshold']) == truth.masks).double().mean() > 0.9999


@pytest.mark.parametrize('kind', ['upernet', 'semantic_fpn'])
def test_segmenter_gives_the_logits_and_labels_of_mmseg(kind, small, picture):
    logits, labels = (subject_of(small, kind, label_map=label_map) for label_map in (False, True))
    image = logits.read(picture)
    with torch.no_grad():
        size = tuple(image.shape[2:])
        metas = [dict(img_shape=size, ori_shape=size, pad_shape=size)]
        expected = logits.module.model.encode_decode(image, metas)
        torch.testing.assert_close(logits.module(image)[0], expected)
        assert torch.equal(labels.module(image)[0], expected.argmax(1))
    assert (logits.outputs, labels.outputs) == (('logits',), ('labels',))


def test_classes_come_from_the_checkpoint_and_else_from_the_data_set(small):
    config, checkpoint = small('retinanet')
    info = make_subject(config, str(checkpoint)).info
    assert (info['classes'], info['palette']) == (list(CLASSES['classes']), CLASSES['palette'])
    assert make_subject(config, None).info['classes'][:2] == ['person', 'bicycle']


def test_backbone_and_classifier_are_folded(small, tmp_path, picture):
    backbone = subject_of(small, 'upernet', part='backbone')
    assert backbone.outputs == ('stride4', 'stride8', 'stride16', 'stride32')
    assert backbone.module.network.form == 'folded'
    torch.save(OverLoCK(TINY, num_classes=3).state_dict(), tmp_path / 'tiny.pth')
    classifier = make_subject('overlock_xt', str(tmp_path / 'tiny.pth'))
    assert classifier.module(classifier.read(picture))[0].shape == (1, 3)
    assert classifier.module.network.form == 'folded'


@pytest.mark.parametrize(
    ('kind', 'part', 'narrow'),
    [
        ('upernet', 'all', ('backbone', 'decode_head')),
        ('mask_rcnn', 'all', ('backbone', 'neck')),
        ('retinanet', 'backbone', ('network',)),
    ],
)
def test_copy_in_half_precision_keeps_boxes_and_the_original_in_float32(kind, part, narrow, small):
    module = subject_of(small, kind, part=part).module
    half = in_half(module)
    for name, parameter in half.named_parameters():
        inside = name.removeprefix('model.').startswith(narrow)
        assert parameter.dtype == (torch.float16 if inside else torch.float32), name
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_half_precision_is_between_maps_in_float32():
    seen = []
    conv = torch.nn.Conv2d(3, 4, 1)
    x = torch.rand(2, 3, 5, 5)
    expected = conv(x)
    half = Half(conv)
    conv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for given in (x, (x,)):
        if isinstance(given, tuple):
            half.network = torch.nn.Identity()
            (out,) = half(given)
            torch.testing.assert_close(out, x, rtol=1e-3, atol=1e-3)
        else:
            out = half(given)
            torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
        assert out.dtype == torch.float32
    assert seen == [torch.float16]


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        ('retinanet', dict(label_map=True), '--label-map is for segmenters'),
        ('retinanet', dict(cfg_options={'model.type': 'FCOS'}), 'a FCOS, expected Mask R-CNN, .* --part backbone'),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(kind, options, message, small, monkeypatch):
    import mmengine_overlock.export.subjects as subjects

    if 'cfg_options' in options:

        class FCOS(torch.nn.Module):
            backbone = OverLoCK(TINY)

        FCOS.backbone.out_indices = (0,)
        monkeypatch.setattr(subjects, 'build', lambda *args: FCOS())
    with pytest.raises(UserError, match=message):
        subject_of(small, kind, **options)


def test_overlap_of_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    torch.testing.assert_close(iou(boxes[:1], boxes), torch.tensor([[1, 1 / 3, 0]]))


def test_detections_are_compared_in_any_order_by_place_label_score_and_mask():
    boxes = torch.tensor([[0.0, 0, 40, 40], [50, 0, 90, 40], [0, 0, 0, 0]])
    scores, labels = torch.tensor([0.9, 0.8, -1.0]), torch.tensor([1, 2, 0])
    masks = torch.rand(3, 4, 4)
    truth = boxes, scores, labels, masks
    order = [1, 0, 2]
    assert compare_detections([part[order] for part in truth], truth) == (0.0, 2, 2)
    moved = boxes + torch.tensor([1.0, 0, 1, 0])
    assert compare_detections((moved, *truth[1:]), truth) == (1.0, 2, 2)
    for other in (
        (boxes + 5, scores, labels, masks),
        (boxes, scores - 0.05, labels, masks),
        (boxes, scores, labels + 1, masks),
        (boxes, scores, labels, 1 - masks),
    ):
        assert compare_detections(other, truth)[1:] == (0, 2)
    assert compare_detections([part[:1] for part in truth], truth)[1:] == (1, 2)
    assert compare_detections([part[2:] for part in truth], truth)[1:] == (0, 2)
