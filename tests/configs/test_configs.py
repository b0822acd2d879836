"""Every configuration against a table typed from the published settings, then built, run forward and backward."""

import ast
import re

import pytest
import torch
from mmengine.config import Config
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from overlock.checkpoint import WEIGHTS

VARIANTS = ('xt', 't', 's', 'b')
CHANNELS = {'xt': [56, 112, 340, 420], 't': [64, 128, 384, 640], 's': [64, 128, 448, 640], 'b': [80, 160, 528, 720]}
DROP_PATH = {'coco': {'xt': 0.1, 't': 0.2, 's': 0.4, 'b': 0.6}, 'ade20k': {'xt': 0.1, 't': 0.2, 's': 0.3, 'b': 0.5}}

DETECTORS = [
    f'{head}_overlock_{arch}_{schedule}'
    for head in ('mask_rcnn', 'cascade')
    for arch in VARIANTS
    for schedule in ('1x', '3x')
]
SEGMENTERS = [f'upernet_overlock_{arch}_160k' for arch in VARIANTS]
ALL = DETECTORS + SEGMENTERS


def variant(name: str) -> str:
    return re.search(r'overlock_(xt|t|s|b)_', name).group(1)


def build(cfg: Config):
    """Build the model without its ImageNet weights, on one CPU process."""
    init_default_scope(cfg.default_scope)
    model_cfg = cfg.model.copy()
    model_cfg.backbone = model_cfg.backbone.copy()
    model_cfg.backbone.pop('init_cfg')
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(model_cfg))
    model.init_weights()
    return model


def detection_batch(height: int, width: int) -> dict:
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(
        batch_size=2, image_shapes=(3, height, width), num_items=[2, 1], num_classes=80, with_mask=True
    )


def segmentation_batch(height: int, width: int) -> dict:
    from mmseg.structures import SegDataSample

    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(ori_shape=(height, width), img_shape=(height, width)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, height, width), generator=generator))
        samples.append(sample)
    images = [torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8) for _ in range(2)]
    return dict(inputs=images, data_samples=samples)


def test_exactly_the_twenty_configurations_are_shipped(configs_dir):
    assert {path.stem for path in configs_dir.glob('*.py')} == set(ALL)
    assert len(ALL) == 20


@pytest.mark.parametrize('name', ALL)
def test_parses_from_any_folder_and_working_directory(name, configs_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    user_file = tmp_path / 'mine.py'
    user_file.write_text(f"_base_ = r'{configs_dir / name}.py'\nwork_dir = 'here'\n")
    cfg = Config.fromfile('mine.py')
    assert cfg.model.backbone.type == 'OverLoCK'
    # The runner writes the merged configuration to the work directory, from where it must parse again.
    dumped = tmp_path / 'dumped.py'
    cfg.dump(dumped)
    assert Config.fromfile(dumped).to_dict() == cfg.to_dict()


def bases(path) -> list:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == '_base_':
            value = ast.literal_eval(node.value)
            return [path.parent / base for base in ([value] if isinstance(value, str) else value)]
    return []


def levels(path) -> int:
    return 1 + max((levels(base) for base in bases(path)), default=0)


@pytest.mark.parametrize('name', ALL)
def test_inherits_from_own_bases_over_at_most_three_levels(name, configs_dir):
    path = configs_dir / f'{name}.py'
    assert levels(path) <= 3
    assert all(base.is_relative_to(configs_dir / '_base_') for base in bases(path))


@pytest.mark.parametrize('name', ALL)
def test_backbone_matches_the_table(name, load_config):
    cfg, arch = load_config(name), variant(name)
    backbone = cfg.model.backbone
    assert backbone.arch == arch
    assert backbone.drop_path_rate == DROP_PATH['ade20k' if name in SEGMENTERS else 'coco'][arch]
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=f'overlock_{arch}_in1k')
    weights = WEIGHTS[backbone.init_cfg.checkpoint]
    assert (weights.arch, weights.task, weights.form) == (arch, 'classification', 'training')
    # Everything else is the backbone's own default for the toolbox.
    assert set(backbone) == {'type', 'arch', 'drop_path_rate', 'init_cfg'}


@pytest.mark.parametrize('name', [name for name, weights in WEIGHTS.items() if weights.config])
def test_published_weights_expect_the_images_of_their_configuration(name, load_config):
    weights = WEIGHTS[name]
    cfg, images = load_config(weights.config), weights.preprocessing
    assert variant(weights.config) == weights.arch
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == pytest.approx([255 * mean for mean in images.mean])
    assert preprocessor.std == pytest.approx([255 * std for std in images.std])
    steps = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert sorted(steps['Resize'].scale) == list(images.size) and steps['Resize'].get('interpolation', 'bilinear') == (
        images.interpolation
    )
    stretched = steps.get('ResizeToMultiple')
    assert (stretched.size_divisor if stretched else preprocessor.pad_size_divisor) == images.size_divisor
    assert (stretched.interpolation if stretched else None) == images.divisor_interpolation


@pytest.mark.parametrize('name', DETECTORS)
def test_detector_matches_the_table(name, load_config):
    cfg = load_config(name)
    assert cfg.default_scope == 'mmdet'
    assert cfg.custom_imports == dict(imports=['mmdet_overlock'], allow_failed_imports=False)
    assert cfg.model.neck.in_channels == CHANNELS[variant(name)]
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert preprocessor.bgr_to_rgb and preprocessor.pad_mask and preprocessor.pad_size_divisor == 32
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)


@pytest.mark.parametrize('name', [name for name in DETECTORS if name.startswith('cascade')])
def test_cascade_has_the_heads_of_swin_and_convnext(name, load_config):
    model = load_config(name).model
    heads = model.roi_head.bbox_head
    assert [head.bbox_coder.target_stds for head in heads] == [
        [0.1, 0.1, 0.2, 0.2],
        [0.05, 0.05, 0.1, 0.1],
        [0.033, 0.033, 0.067, 0.067],
    ]
    for head in heads:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ('ConvFCBBoxHead', 4, 1)
        assert head.norm_cfg.type == 'SyncBN'
        assert head.reg_decoded_bbox and not head.reg_class_agnostic
        assert head.loss_bbox == dict(type='GIoULoss', loss_weight=10.0)
    assert [stage.assigner.pos_iou_thr for stage in model.train_cfg.rcnn] == [0.5, 0.6, 0.7]
    assert model.roi_head.stage_loss_weights == [1, 0.5, 0.25]


@pytest.mark.parametrize('name', SEGMENTERS)
def test_segmenter_matches_the_table(name, load_config):
    cfg, channels = load_config(name), CHANNELS[variant(name)]
    assert cfg.default_scope == 'mmseg'
    assert cfg.custom_imports == dict(imports=['mmseg_overlock'], allow_failed_imports=False)
    decode, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (decode.type, decode.channels, decode.in_channels) == ('UPerHead', 512, channels)
    assert (auxiliary.type, auxiliary.in_index, auxiliary.in_channels) == ('FCNHead', 2, channels[2])
    assert auxiliary.loss_decode.loss_weight == 0.4
    assert decode.norm_cfg.type == auxiliary.norm_cfg.type == 'SyncBN'
    assert decode.num_classes == auxiliary.num_classes == 150
    preprocessor = cfg.model.data_preprocessor
    assert (preprocessor.size, preprocessor.pad_val, preprocessor.seg_pad_val) == ((512, 512), 0, 255)
    assert cfg.model.test_cfg.mode == 'whole'
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)


@pytest.mark.parametrize('arch', VARIANTS)
@pytest.mark.parametrize('head', ['mask_rcnn', 'cascade'])
def test_schedules_share_one_model(head, arch, load_config):
    assert load_config(f'{head}_overlock_{arch}_1x').model == load_config(f'{head}_overlock_{arch}_3x').model


@pytest.mark.parametrize('name', ALL)
def test_runtime_saves_logs_and_picks_the_best(name, load_config):
    cfg = load_config(name)
    checkpoint = cfg.default_hooks.checkpoint
    by_epoch = name not in SEGMENTERS
    assert checkpoint.get('by_epoch', True) is cfg.log_processor.by_epoch is by_epoch
    assert checkpoint.interval == cfg.train_cfg.val_interval == (1 if by_epoch else 8000)
    assert checkpoint.save_best == ('coco/bbox_mAP' if by_epoch else 'mIoU')
    assert cfg.default_hooks.logger.interval == 50
    assert cfg.load_from is None and cfg.resume is False
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        # A shuffled or short test set would make scores of distributed and single runs differ.
        assert loader.sampler.shuffle is (split == 'train')
        assert loader.persistent_workers and loader.num_workers > 0


def shrink(cfg: Config) -> Config:
    """Make a training step cheap on a CPU: fewer regions, crops padded to 64x64; the layers stay as they are."""
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = (64, 64)
    else:
        rcnn = cfg.model.train_cfg.rcnn
        for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
            stage.sampler.num = 16
    return cfg


def runnable(names: list[str]) -> list:
    return [pytest.param(name, marks=pytest.mark.slow if variant(name) in ('s', 'b') else ()) for name in names]


@pytest.mark.parametrize('name', runnable(ALL))
def test_trains_one_step_with_a_gradient_for_every_parameter(name, load_config):
    model = build(shrink(load_config(name))).train()
    assert list(model.backbone.out_channels) == CHANNELS[variant(name)]
    batch = segmentation_batch(64, 64) if name in SEGMENTERS else detection_batch(64, 96)
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    total, logged = model.parse_losses(losses)
    assert all(torch.isfinite(value).all() for value in logged.values()), logged
    assert total > 0
    total.backward()
    # DDP without `find_unused_parameters` needs this of the whole model, not of the backbone alone.
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.backbone.parameters())


@pytest.mark.parametrize('name', ['mask_rcnn_overlock_xt_1x', 'cascade_overlock_xt_3x'])
def test_detector_predicts_boxes_and_masks_at_the_original_size(name, load_config):
    cfg = load_config(name)
    # Random weights score every class near 1/81, below the threshold that trained models are cut at.
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    cfg.model.test_cfg.rpn.max_per_img = 20
    model = build(cfg).eval()
    batch = detection_batch(64, 96)
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(ori_shape=(32, 48), scale_factor=(2.0, 2.0)))
    with torch.no_grad():
        results = model.test_step(batch)
    for result in results:
        predictions = result.pred_instances
        assert 0 < len(predictions) <= 100
        assert predictions.masks.shape[1:] == (32, 48)
        assert (predictions.bboxes[:, 2] <= 48).all() and (predictions.bboxes[:, 3] <= 32).all()


def test_segmenter_predicts_at_the_original_size(load_config):
    model = build(load_config('upernet_overlock_xt_160k')).eval()
    batch = segmentation_batch(64, 96)
    for sample in batch['data_samples']:
        sample.set_metainfo(dict(ori_shape=(33, 47)))
    with torch.no_grad():
        results = model.test_step(batch)
    assert all(result.pred_sem_seg.shape == (33, 47) for result in results)
    assert all(result.seg_logits.shape == (33, 47) for result in results)
    assert all(len(result.seg_logits.data) == 150 for result in results)
