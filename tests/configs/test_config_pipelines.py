"""The data pipelines of the configurations on images from disk."""

from functools import partial

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, METRICS, MODELS, init_default_scope

from tests.configs.testing import load_config

SHORT_SIDES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]


def build_dataset(name: str, split: str, root, pipeline=None):
    """Build the dataset of a data loader with its root moved, and its pipeline replaced if one is given."""
    cfg = load_config(name)
    init_default_scope(cfg.default_scope)
    dataset = cfg[f'{split}_dataloader'].dataset
    dataset.data_root = str(root)
    if pipeline is not None:
        dataset.pipeline = pipeline
    return DATASETS.build(dataset)


def build_preprocessor(name: str) -> torch.nn.Module:
    cfg = load_config(name)
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model.data_preprocessor)


@pytest.fixture
def coco(coco_root):
    return partial(build_dataset, root=coco_root)


@pytest.fixture
def ade(ade_root):
    return partial(build_dataset, 'upernet_overlock_xt_160k', root=ade_root)


def test_coco_1x_trains_at_one_scale(coco):
    dataset = coco('mask_rcnn_overlock_xt_1x', 'train')
    assert len(dataset) == 2
    shapes = {tuple(dataset[index]['inputs'].shape) for index in range(2)}
    # 120 x 200 meets the bound 1333 of the long side and 800 of the short side at once; 150 x 90 the long side alone.
    assert shapes == {(3, 800, 1333), (3, 1333, 800)}


@pytest.mark.parametrize('name', ['mask_rcnn_overlock_xt_3x', 'cascade_overlock_xt_1x', 'cascade_overlock_xt_3x'])
def test_multi_scale_training_draws_both_detr_branches(name):
    pipeline = load_config(name).train_dataloader.dataset.pipeline
    choice = next(step for step in pipeline if step.type == 'RandomChoice')
    plain, cropped = choice.transforms
    assert [step.type for step in plain] == ['RandomChoiceResize']
    assert [step.type for step in cropped] == ['RandomChoiceResize', 'RandomCrop', 'RandomChoiceResize']
    for step in (plain[0], cropped[2]):
        assert step.scales == [(short, 1333) for short in SHORT_SIDES]
    assert [scale[0] for scale in cropped[0].scales] == [400, 500, 600]
    assert cropped[1].crop_type == 'absolute_range'
    assert cropped[1].crop_size == (384, 600)
    assert cropped[1].allow_negative_crop


def test_coco_trains_at_many_scales(coco):
    np.random.seed(0)
    dataset = coco('cascade_overlock_xt_3x', 'train')
    seen = set()
    for _ in range(12):
        packed = dataset[0]
        _, height, width = packed['inputs'].shape
        assert min(height, width) in SHORT_SIDES or max(height, width) == 1333
        assert max(height, width) <= 1333
        instances = packed['data_samples'].gt_instances
        assert instances.masks.masks.shape[1:] == (height, width)
        assert len(instances.masks) == len(instances.bboxes)
        seen.add((height, width))
    assert len(seen) > 5


def test_coco_test_pipeline_keeps_the_truth_at_the_original_size(coco):
    packed = coco('mask_rcnn_overlock_xt_1x', 'test')[0]
    sample = packed['data_samples']
    assert packed['inputs'].shape == (3, 800, 1333)
    assert sample.ori_shape == (120, 200)
    assert sample.img_shape == (800, 1333)
    assert sample.gt_instances.masks.masks.shape[1:] == (120, 200)
    assert {'img_id', 'img_path', 'scale_factor'} <= set(sample.metainfo)


def test_coco_batch_is_padded_to_multiples_of_32(coco):
    dataset = coco('mask_rcnn_overlock_xt_1x', 'train')
    preprocessor = build_preprocessor('mask_rcnn_overlock_xt_1x')
    items = [dataset[0], dataset[1]]
    batch = preprocessor(
        dict(inputs=[item['inputs'] for item in items], data_samples=[item['data_samples'] for item in items]),
        training=True,
    )
    assert batch['inputs'].shape == (2, 3, 1344, 1344)
    assert all(sample.gt_instances.masks.masks.shape[1:] == (1344, 1344) for sample in batch['data_samples'])


def test_preprocessor_turns_bgr_to_rgb_and_normalizes():
    # A BGR image of ImageNet's mean color becomes zero.
    bgr = torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1).expand(3, 64, 64)
    for name in ('mask_rcnn_overlock_xt_1x', 'upernet_overlock_xt_160k'):
        out = build_preprocessor(name)(dict(inputs=[bgr], data_samples=None), training=False)['inputs']
        torch.testing.assert_close(out, torch.zeros(1, 3, 64, 64))


def test_ade_trains_on_crops_of_512(ade):
    np.random.seed(0)
    dataset = ade('train')
    preprocessor = build_preprocessor('upernet_overlock_xt_160k')
    smaller = 0
    for _ in range(8):
        packed = dataset[0]
        _, height, width = packed['inputs'].shape
        labels = packed['data_samples'].gt_sem_seg.data
        assert height <= 512 and width <= 512
        assert labels.shape == (1, height, width)
        assert set(labels.unique().tolist()) <= {0, 1, 2, 255}
        smaller += height < 512
        batch = preprocessor(dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']]), training=True)
        assert batch['inputs'].shape == (1, 3, 512, 512)
        padded = batch['data_samples'][0].gt_sem_seg.data
        assert padded.shape == (1, 512, 512)
        assert (padded[:, height:] == 255).all() and (padded[:, :, width:] == 255).all()
    assert smaller, 'no draw went below the crop size, so padding was not tested'


def test_ade_tests_on_multiples_of_32(ade, ade_root):
    packed = ade('test')[0]
    sample = packed['data_samples']
    # 300 x 401 becomes 512 x 684 with its ratio kept, then 512 x 704.
    assert packed['inputs'].shape == (3, 512, 704)
    assert sample.ori_shape == (300, 401)
    assert sample.gt_sem_seg.data.shape == (1, 300, 401)
    # The first resize is bilinear, the second bicubic.
    image = cv2.imread(str(ade_root / 'images/validation/scene.jpg'))
    image = cv2.resize(cv2.resize(image, (684, 512)), (704, 512), interpolation=cv2.INTER_CUBIC)
    assert np.array_equal(packed['inputs'].permute(1, 2, 0), image)
    # The image is stretched, not padded: its last column is image.
    assert packed['inputs'][:, :, -20:].float().std() > 1
    # Label 0 of the files is no class.
    assert (sample.gt_sem_seg.data[:, :, :134] == 255).all()
    assert set(sample.gt_sem_seg.data[:, :, 134:].unique().tolist()) == {0, 1, 2}


def test_detection_tta_gives_both_flips(coco):
    cfg = load_config('cascade_overlock_xt_3x')
    packed = coco('cascade_overlock_xt_3x', 'test', pipeline=cfg.tta_pipeline)[0]
    assert [sample.flip for sample in packed['data_samples']] == [False, True]
    plain, flipped = packed['inputs']
    assert plain.shape == (3, 800, 1333)
    torch.testing.assert_close(flipped, plain.flip(-1))


def test_segmentation_tta_gives_six_scales_and_both_flips(ade):
    cfg = load_config('upernet_overlock_xt_160k')
    packed = ade('test', pipeline=cfg.tta_pipeline)[0]
    assert len(packed['inputs']) == 12
    assert cfg.tta_pipeline[1].transforms[1] == [step for step in cfg.test_pipeline if step.type == 'ResizeToMultiple']
    assert all(size % 32 == 0 for view in packed['inputs'] for size in view.shape[1:])
    assert {view.shape[1] for view in packed['inputs']} == {256, 384, 512, 640, 768, 896}
    assert sum(bool(sample.flip) for sample in packed['data_samples']) == 6


@pytest.mark.parametrize('name', ['mask_rcnn_overlock_xt_1x', 'cascade_overlock_xt_3x'])
@pytest.mark.parametrize('split', ['val', 'test'])
def test_coco_is_scored_by_box_and_mask_for_each_class(name, split, coco_root):
    cfg = load_config(name)
    evaluator, dataset = cfg[f'{split}_evaluator'], cfg[f'{split}_dataloader'].dataset
    assert evaluator.metric == ['bbox', 'segm']
    assert evaluator.classwise
    assert evaluator.ann_file == dataset.data_root + dataset.ann_file
    init_default_scope('mmdet')
    evaluator.ann_file = str(coco_root / dataset.ann_file)
    METRICS.build(evaluator)


def test_ade_is_scored_by_miou():
    cfg = load_config('upernet_overlock_xt_160k')
    assert cfg.val_evaluator == cfg.test_evaluator == dict(type='IoUMetric', iou_metrics=['mIoU'])
