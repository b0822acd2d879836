"""Detectors saved by mmdet 2.28, evaluated here: every step after the backbone against the rules of mmdet 2.28.

The rules are written out as functions of the old state dict; `docs/legacy_checkpoints.md` lists them.
"""

import json
import math
import shutil
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from overlock.checkpoint import CheckpointError
from tests.configs import legacy
from tests.configs.legacy import conv
from tests.configs.testing import CHANNELS, default_scope, load_config
from tests.testing import TOLERANCES, assert_relative

STRIDES = (4, 8, 16, 32, 64)
# The two sides are scaled by slightly different factors, and are no multiples of 32 afterwards.
SCALE = (299, 180)
FLOAT32 = TOLERANCES[torch.float32]


def old_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of Mask R-CNN's neck and heads in mmdet 2.28."""
    bbox, mask = 'roi_head.bbox_head', 'roi_head.mask_head'
    weights = {
        **{f'neck.lateral_convs.{i}.conv': (256, channels, 1, 1) for i, channels in enumerate(CHANNELS[arch])},
        **{f'neck.fpn_convs.{i}.conv': (256, 256, 3, 3) for i in range(4)},
        'rpn_head.rpn_conv': (256, 256, 3, 3),
        'rpn_head.rpn_cls': (3, 256, 1, 1),
        'rpn_head.rpn_reg': (12, 256, 1, 1),
        f'{bbox}.shared_fcs.0': (1024, 256 * 7 * 7),
        f'{bbox}.shared_fcs.1': (1024, 1024),
        f'{bbox}.fc_cls': (81, 1024),
        f'{bbox}.fc_reg': (4 * 80, 1024),
        **{f'{mask}.convs.{i}.conv': (256, 256, 3, 3) for i in range(4)},
        f'{mask}.upsample': (256, 256, 2, 2),
        f'{mask}.conv_logits': (80, 256, 1, 1),
    }
    return {
        f'{name}.{kind}': shape if kind == 'weight' else shape[:1]
        for name, shape in weights.items()
        for kind in ('weight', 'bias')
    }


def old_weights(arch: str) -> dict[str, Tensor]:
    weights = legacy.backbone_weights('det', arch) | legacy.head_weights(old_shapes(arch))
    # Proposals that are not all cut off at the border, and classes that are well apart.
    weights['rpn_head.rpn_reg.weight'] *= 0.3
    weights['roi_head.bbox_head.fc_cls.weight'] *= 4
    return weights


def old_input(path, scale) -> SimpleNamespace:
    """Apply the test pipeline of mmdet 2.28; return the image (1, 3, H, W) and its metadata."""
    image = cv2.imread(str(path))
    resized = legacy.rescaled(image, scale)
    (height, width), (old_height, old_width) = resized.shape[:2], image.shape[:2]
    tensor = F.pad(legacy.normalized(resized), (0, -width % 32, 0, -height % 32))
    factor = torch.tensor([width / old_width, height / old_height] * 2)
    return SimpleNamespace(image=tensor, shape=(height, width), ori_shape=(old_height, old_width), factor=factor)


def old_neck(weights, maps):
    maps = [conv(weights, f'neck.lateral_convs.{i}.conv', x) for i, x in enumerate(maps)]
    for i in (3, 2, 1):
        maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[2:], mode='nearest')
    maps = [conv(weights, f'neck.fpn_convs.{i}.conv', x, padding=1) for i, x in enumerate(maps)]
    return [*maps, maps[-1][:, :, ::2, ::2]]


def old_rpn(weights, maps):
    maps = [F.relu(conv(weights, 'rpn_head.rpn_conv', x, padding=1)) for x in maps]
    return [[conv(weights, f'rpn_head.{name}', x) for x in maps] for name in ('rpn_cls', 'rpn_reg')]


def old_anchors(size, stride) -> Tensor:
    """Return three anchors of area (8 strides)^2 around each multiple of the stride; (H x W x 3, 4)."""
    height, width = size
    boxes = [
        (-w / 2, -h / 2, w / 2, h / 2)
        for w, h in ((stride * 8 / math.sqrt(ratio), stride * 8 * math.sqrt(ratio)) for ratio in (0.5, 1, 2))
    ]
    y, x = np.mgrid[:height, :width] * stride
    centers = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    return torch.tensor((centers + np.array(boxes)).reshape(-1, 4), dtype=torch.float32)


def old_decode(boxes, deltas, stds, shape) -> Tensor:
    """Return boxes (N, 4) moved by deltas (N, 4) and clipped to an image of `shape`."""
    deltas = deltas * torch.tensor(stds)
    limit = abs(math.log(16 / 1000))
    sides = boxes[:, 2:] - boxes[:, :2]
    centers = (boxes[:, :2] + boxes[:, 2:]) * 0.5 + sides * deltas[:, :2]
    sides = sides * deltas[:, 2:].clamp(-limit, limit).exp()
    height, width = shape
    corners = torch.cat([centers - sides * 0.5, centers + sides * 0.5], 1)
    return torch.minimum(corners.clamp(min=0), torch.tensor([width, height, width, height]))


def old_nms(boxes, scores, groups, threshold) -> Tensor:
    """Return the indices of the kept boxes by falling score; boxes of different groups are moved apart."""
    return nms(boxes + (groups * (boxes.max() + 1))[:, None], scores, threshold)


def old_proposals(scores, deltas, shape) -> Tensor:
    chosen = []
    for level, stride in enumerate(STRIDES):
        score = scores[level][0].permute(1, 2, 0).reshape(-1).sigmoid()
        score, order = score.sort(descending=True)
        order = order[:1000]
        delta = deltas[level][0].permute(1, 2, 0).reshape(-1, 4)[order]
        anchors = old_anchors(scores[level].shape[2:], stride)[order]
        boxes = old_decode(anchors, delta, (1.0, 1.0, 1.0, 1.0), shape)
        chosen.append((boxes, score[:1000], torch.full_like(order, level)))
    boxes, scores, levels = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    valid = (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes, scores, levels = boxes[valid], scores[valid], levels[valid]
    kept = old_nms(boxes, scores, levels, 0.7)[:1000]
    return torch.cat([scores[kept, None], boxes[kept]], 1)


def old_regions(maps, boxes, size) -> Tensor:
    """Apply RoIAlign on the level of each box: boxes below 112 pixels on stride 4, a level up for each doubling."""
    side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    levels = (side / 56 + 1e-6).log2().floor().clamp(0, 3)
    regions = boxes.new_zeros(len(boxes), 256, size, size)
    for level in range(4):
        chosen = levels == level
        regions[chosen] = roi_align(
            maps[level], [boxes[chosen]], size, 1 / STRIDES[level], sampling_ratio=0, aligned=True
        )
    return regions


def old_bbox_head(weights, regions):
    def linear(name, x):
        name = f'roi_head.bbox_head.{name}'
        return F.linear(x, weights[f'{name}.weight'], weights[f'{name}.bias'])

    x = F.relu(linear('shared_fcs.1', F.relu(linear('shared_fcs.0', regions.flatten(1)))))
    return linear('fc_cls', x), linear('fc_reg', x)


def old_detections(boxes, logits, deltas, image):
    """Return boxes in the original image, scores and labels; the last of the 81 classes is the background."""
    boxes = old_decode(boxes.repeat_interleave(80, 0), deltas.reshape(-1, 4), (0.1, 0.1, 0.2, 0.2), image.shape)
    boxes, scores = boxes / image.factor, logits.softmax(1)[:, :80].flatten()
    labels = torch.arange(80).repeat(len(logits))
    sure = scores > 0.05
    boxes, scores, labels = boxes[sure], scores[sure], labels[sure]
    kept = old_nms(boxes, scores, labels, 0.5)[:100]
    return boxes[kept], scores[kept], labels[kept]


def old_mask_head(weights, regions) -> Tensor:
    for i in range(4):
        regions = F.relu(conv(weights, f'roi_head.mask_head.convs.{i}.conv', regions, padding=1))
    name = 'roi_head.mask_head.upsample'
    regions = F.relu(F.conv_transpose2d(regions, weights[f'{name}.weight'], weights[f'{name}.bias'], stride=2))
    return conv(weights, 'roi_head.mask_head.conv_logits', regions)


def old_pasted(logits, boxes, labels, ori_shape) -> Tensor:
    """Return probabilities (N, H, W) of the masks of the labels, sampled at the centers of the original pixels."""
    height, width = ori_shape
    probabilities = logits.sigmoid()[torch.arange(len(labels)), labels][:, None]
    corner, sides = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    x = (torch.arange(width) + 0.5 - corner[:, :1]) / sides[:, :1] * 2 - 1
    y = (torch.arange(height) + 0.5 - corner[:, 1:]) / sides[:, 1:] * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], -1)
    return F.grid_sample(probabilities, grid, align_corners=False)[:, 0]


def old_detector(weights, maps, image):
    """Return boxes, scores, labels and mask probabilities from the four maps of the backbone."""
    maps = old_neck(weights, maps)
    boxes = old_proposals(*old_rpn(weights, maps), image.shape)[:, 1:]
    boxes, scores, labels = old_detections(boxes, *old_bbox_head(weights, old_regions(maps, boxes, 7)), image)
    masks = old_mask_head(weights, old_regions(maps, boxes * image.factor, 14))
    return boxes, scores, labels, old_pasted(masks, boxes, labels, image.ori_shape)


@pytest.fixture(scope='module', params=['xt', pytest.param('t', marks=pytest.mark.slow)])
def old(request, coco_root, tmp_path_factory):
    """Return an old file, the model built from it, and each step's results for the first image; gradients are off."""
    folder, weights = tmp_path_factory.mktemp('old'), old_weights(request.param)
    name = f'mask_rcnn_overlock_{request.param}_1x'
    file = legacy.save(folder / 'maskrcnn.pth', weights, mmdet_version='2.28.2', epoch=12, CLASSES=('person',))
    with default_scope(), torch.no_grad():
        loop = legacy.load(name, file, coco_root, folder, SCALE)
        model = loop.runner.model.eval()
        batch = model.data_preprocessor(pseudo_collate([loop.dataloader.dataset[0]]))
        maps = model.backbone(batch['inputs'])
        features = model.neck(maps)
        scores, deltas = model.rpn_head(features)
        metas = [sample.metainfo for sample in batch['data_samples']]
        proposals = model.rpn_head.predict_by_feat(scores, deltas, batch_img_metas=metas)[0]
        image = old_input(coco_root / 'val2017/000000000001.png', SCALE)
        yield SimpleNamespace(
            name=name,
            weights=weights,
            loop=loop,
            model=model,
            image=image,
            metas=metas,
            maps=maps,
            features=features,
            scores=scores,
            deltas=deltas,
            proposals=proposals,
        )


def test_the_model_has_every_tensor_of_the_file(old):
    legacy.assert_holds(old.model, old.weights)


def test_a_file_without_one_tensor_of_a_head_is_refused(old, tmp_path):
    weights = {name: value for name, value in old.weights.items() if name != 'roi_head.mask_head.upsample.bias'}
    file = legacy.save(tmp_path / 'cut.pth', weights, mmdet_version='2.28.2')
    with pytest.raises(CheckpointError, match=r'1 tensor missing .*roi_head.mask_head.upsample.bias'):
        old.loop.runner.load_checkpoint(str(file))


@pytest.mark.parametrize('scale', [SCALE, (1333, 800)])
def test_images_are_prepared_as_before(old, scale, coco_root):
    dataset = load_config(old.name).test_dataloader.dataset
    dataset.data_root = str(coco_root)
    dataset.pipeline[1].scale = scale
    dataset = DATASETS.build(dataset)
    for index in range(2):
        batch = old.model.data_preprocessor(pseudo_collate([dataset[index]]))
        sample = batch['data_samples'][0]
        expected = old_input(sample.img_path, scale)
        assert batch['inputs'].shape == expected.image.shape
        assert_relative(batch['inputs'], expected.image, FLOAT32)
        assert (sample.img_shape, sample.ori_shape) == (expected.shape, expected.ori_shape)
        assert_relative(sample.scale_factor, expected.factor[:2], FLOAT32)


def test_the_neck_gives_the_same_five_maps(old):
    for actual, expected in zip(old.features, old_neck(old.weights, old.maps), strict=True):
        assert_relative(actual, expected, FLOAT32)


def test_the_rpn_gives_the_same_maps(old):
    for actual, expected in zip((old.scores, old.deltas), old_rpn(old.weights, old.features), strict=True):
        for a, b in zip(actual, expected, strict=True):
            assert_relative(a, b, FLOAT32)


def test_anchors_lie_where_they_did(old):
    sizes = [x.shape[2:] for x in old.features]
    anchors = old.model.rpn_head.prior_generator.grid_priors(sizes, device='cpu')
    for actual, size, stride in zip(anchors, sizes, STRIDES, strict=True):
        torch.testing.assert_close(actual, old_anchors(size, stride))


def test_the_same_proposals_are_chosen(old):
    expected = old_proposals(old.scores, old.deltas, old.image.shape)
    actual = torch.cat([old.proposals.scores[:, None], old.proposals.bboxes], 1)
    assert len(actual) == len(expected) == 1000
    # In one order: a few scores are equal.
    assert_relative(actual.unique(dim=0), expected.unique(dim=0), FLOAT32)


@pytest.mark.parametrize('size, extractor', [(7, 'bbox_roi_extractor'), (14, 'mask_roi_extractor')])
def test_regions_are_cut_out_of_the_same_levels(old, size, extractor):
    # Squares at and beside each change of level, then boxes that were proposed.
    sides = torch.tensor([3, 56, 111.9, 112, 112.1, 223.9, 224, 300, 447.9, 448, 900])[:, None]
    boxes = torch.cat(
        [torch.tensor([7.0, 5.0, 7.0, 5.0]) + sides * torch.tensor([0, 0, 1, 1]), old.proposals.bboxes[:50]]
    )
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], 1)
    actual = getattr(old.model.roi_head, extractor)(old.features[:4], rois)
    assert_relative(actual, old_regions(old.features, boxes, size), FLOAT32)


def test_the_bbox_head_gives_the_same_classes_and_deltas(old):
    regions = old_regions(old.features, old.proposals.bboxes[:100], 7)
    actual, expected = old.model.roi_head.bbox_head(regions), old_bbox_head(old.weights, regions)
    assert_relative(actual[0], expected[0], FLOAT32)
    assert_relative(actual[1], expected[1], FLOAT32)


def test_detections_are_kept_from_the_same_score_on(old):
    # So few boxes that the 100 best are all of them.
    boxes = old.proposals.bboxes[:10]
    logits, deltas = old_bbox_head(old.weights, old_regions(old.features, boxes, 7))
    head, rois = old.model.roi_head.bbox_head, torch.cat([torch.zeros(10, 1), boxes], 1)
    actual = head.predict_by_feat((rois,), (logits,), (deltas,), old.metas, old.model.test_cfg.rcnn, rescale=True)[0]
    boxes, scores, labels = old_detections(boxes, logits, deltas, old.image)
    assert 10 < len(labels) < 100 and torch.equal(actual.labels, labels)
    torch.testing.assert_close(actual.scores, scores)
    assert_relative(actual.bboxes, boxes, FLOAT32)


def test_the_mask_head_gives_the_same_logits(old):
    regions = old_regions(old.features, old.proposals.bboxes[:10], 14)
    actual = old.model.roi_head.mask_head(regions)
    assert actual.shape == (10, 80, 28, 28)
    assert_relative(actual, old_mask_head(old.weights, regions), FLOAT32)


def test_images_get_the_same_boxes_scores_labels_and_masks(old):
    # The second image, upright: each step alone saw the first.
    _, data = old.loop.dataloader
    image = old_input(data['data_samples'][0].img_path, SCALE)
    boxes, scores, labels, masks = old_detector(old.weights, old.model.backbone(image.image), image)
    actual = old.model.test_step(data)[0].pred_instances
    assert len(actual) == 100 and len(labels.unique()) > 5
    assert torch.equal(actual.labels, labels)
    # Ten times the tolerance of a single step: the image's last bits go through the whole network.
    assert_relative(actual.bboxes, boxes, 10 * FLOAT32)
    assert_relative(actual.scores, scores, 10 * FLOAT32)
    clear = (masks - 0.5).abs() > 1e-4
    assert clear.float().mean() > 0.99 and 0.001 < actual.masks.float().mean() < 0.5
    assert torch.equal(actual.masks[clear], masks[clear] >= 0.5)


def coco_categories() -> list[dict]:
    from mmdet.datasets import CocoDataset

    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    return [dict(id=i, name=name) for i, name in zip(ids, CocoDataset.METAINFO['classes'], strict=True)]


def test_classes_keep_their_names_their_order_and_their_categories(tmp_path):
    from mmdet.datasets import CocoDataset
    from mmdet.evaluation import CocoMetric

    classes = CocoDataset.METAINFO['classes']
    # The checksum of mmdet 2.28's `CocoDataset.CLASSES`.
    assert (len(classes), zlib.crc32('\n'.join(classes).encode())) == (80, 702725029)
    categories = coco_categories()
    ids = [category['id'] for category in categories]
    annotations = [dict(id=i, image_id=1, category_id=i, bbox=[5 * i, 10, 40, 20], area=800, iscrowd=0) for i in ids]
    images = [dict(id=1, file_name='a.jpg', height=100, width=500)]
    file = tmp_path / 'annotations.json'
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    dataset = CocoDataset(ann_file=str(file), data_prefix=dict(img=''), pipeline=[])
    assert dataset.cat2label == {category: label for label, category in enumerate(ids)}
    metric = CocoMetric(ann_file=str(file), metric='bbox')
    metric.dataset_meta = dataset.metainfo
    boxes = torch.tensor([[5 * i, 10, 5 * i + 40, 30] for i in ids], dtype=torch.float32)
    found = dict(bboxes=boxes, scores=torch.ones(80), labels=torch.arange(80))
    metric.process({}, [dict(img_id=1, ori_shape=(100, 500), pred_instances=found)])
    assert metric.evaluate(1)['coco/bbox_mAP'] == 1.0


@pytest.fixture
def photographs(tmp_path, coco_root):
    """Return a COCO folder with all of COCO's categories: photographs where there are any, else the small one."""
    if (legacy.PHOTOGRAPHS / 'coco_tiny').is_dir():
        return (legacy.PHOTOGRAPHS / 'coco_tiny').resolve()
    root = shutil.copytree(coco_root, tmp_path / 'coco')
    file = root / 'annotations/instances_val2017.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(categories=coco_categories())))
    return root


@pytest.mark.slow
def test_the_tool_evaluates_an_old_file(tmp_path, photographs):
    file = legacy.save(tmp_path / 'maskrcnn.pth', old_weights('t'), mmdet_version='2.28.2')
    printed = legacy.evaluate('mask_rcnn_overlock_t_1x', file, photographs, tmp_path, SCALE)
    assert 'coco/bbox_mAP: ' in printed and 'coco/segm_mAP: ' in printed
    assert f'Load checkpoint from {file}' in printed and 'do not match' not in printed
