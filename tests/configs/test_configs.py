"""Every configuration against a table typed from the published settings, then built, run forward and backward."""

import ast

import pytest
import torch
from mmengine.config import Config

from overlock.checkpoint import WEIGHTS
from tests.configs.testing import (
    ALL,
    CHANNELS,
    CONFIGS,
    DETECTORS,
    MODEL_NAMES,
    SEGMENTERS,
    VARIANTS,
    batch,
    build_meta,
    build_small,
    load_config,
    variant,
)

DROP_PATH = {'coco': {'xt': 0.1, 't': 0.2, 's': 0.4, 'b': 0.6}, 'ade20k': {'xt': 0.1, 't': 0.2, 's': 0.3, 'b': 0.5}}

# Those of MogaNet too, whose settings test_moganet_configs.py checks.
EVERY = sorted(path.stem for path in CONFIGS.glob('*.py'))


def test_exactly_the_twenty_configurations_of_overlock_are_shipped():
    assert {path.stem for path in CONFIGS.glob('*overlock*.py')} == set(ALL)
    assert len(ALL) == 20


@pytest.mark.parametrize('name', EVERY)
def test_parses_from_any_folder_and_working_directory(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'mine.py').write_text(f"_base_ = r'{CONFIGS / name}.py'\nwork_dir = 'here'\n")
    assert Config.fromfile('mine.py').to_dict() == {**load_config(name).to_dict(), 'work_dir': 'here'}


@pytest.mark.parametrize('name', [name for name in EVERY if '_xt_' in name or name.startswith('cascade')])
def test_parses_again_from_the_work_directory(name, tmp_path):
    cfg, dumped = load_config(name), tmp_path / 'dumped.py'
    cfg.dump(dumped)
    assert Config.fromfile(dumped).to_dict() == cfg.to_dict()


def bases(path) -> list:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', None) == '_base_':
            value = ast.literal_eval(node.value)
            return [path.parent / base for base in ([value] if isinstance(value, str) else value)]
    return []


def levels(path) -> int:
    return 1 + max((levels(base) for base in bases(path)), default=0)


@pytest.mark.parametrize('name', EVERY)
def test_inherits_from_own_bases_over_at_most_three_levels(name):
    path = CONFIGS / f'{name}.py'
    assert levels(path) <= 3
    assert all(base.is_relative_to(CONFIGS / '_base_') for base in bases(path))


@pytest.mark.parametrize('name', ALL)
def test_backbone_matches_the_table(name):
    cfg, arch = load_config(name), variant(name)
    backbone = cfg.model.backbone
    assert backbone.arch == arch
    assert backbone.drop_path_rate == DROP_PATH['ade20k' if name in SEGMENTERS else 'coco'][arch]
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint=f'overlock_{arch}_in1k')
    weights = WEIGHTS[backbone.init_cfg.checkpoint]
    assert (weights.arch, weights.task, weights.form) == (arch, 'classification', 'training')
    # Everything else is the backbone's own default for the toolbox.
    assert set(backbone) == {'type', 'arch', 'drop_path_rate', 'init_cfg'}


@pytest.mark.parametrize('name', [name for name, w in WEIGHTS.items() if w.config and w.network == 'OverLoCK'])
def test_configuration_of_published_weights_gives_them_the_images_they_expect(name):
    weights = WEIGHTS[name]
    cfg = load_config(weights.config)
    assert variant(weights.config) == weights.arch
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53] and preprocessor.std == [58.395, 57.12, 57.375]
    steps = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert steps['Resize'].get('interpolation', 'bilinear') == 'bilinear'
    if weights.task == 'detection':
        assert sorted(steps['Resize'].scale) == [800, 1333] and preprocessor.pad_size_divisor == 32
        assert 'ResizeToMultiple' not in steps
    else:
        assert sorted(steps['Resize'].scale) == [512, 2048]
        assert steps['ResizeToMultiple'].size_divisor == 32 and steps['ResizeToMultiple'].interpolation == 'bicubic'


@pytest.mark.parametrize('name', DETECTORS)
def test_detector_matches_the_table(name):
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
def test_cascade_has_the_heads_of_swin_and_convnext(name):
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
def test_segmenter_matches_the_table(name):
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
def test_schedules_share_one_model_and_detectors_one_backbone(arch):
    mask_rcnn, cascade = (load_config(f'{head}_overlock_{arch}_1x').model for head in ('mask_rcnn', 'cascade'))
    assert mask_rcnn == load_config(f'mask_rcnn_overlock_{arch}_3x').model
    assert cascade == load_config(f'cascade_overlock_{arch}_3x').model
    assert (cascade.backbone, cascade.neck) == (mask_rcnn.backbone, mask_rcnn.neck)


@pytest.mark.parametrize('name', ALL)
def test_runtime_saves_logs_and_picks_the_best(name):
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


@pytest.mark.parametrize('name', [name for name in MODEL_NAMES if not name.startswith('cascade')])
def test_backbone_feeds_neck_and_heads(name):
    cfg = load_config(name)
    model, image = build_meta(cfg).eval(), torch.zeros(1, 3, 64, 96, device='meta')
    assert list(model.backbone.out_channels) == CHANNELS[variant(name)]
    if name in DETECTORS:
        sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
        assert [x.shape for x in model.extract_feat(image)] == [(1, 256, *size) for size in sizes]
    else:
        maps = model.extract_feat(image)
        assert model.decode_head(maps).shape == (1, 150, 16, 24)
        assert model.auxiliary_head(maps).shape == (1, 150, 4, 6)


@pytest.fixture(
    scope='module',
    params=[pytest.param(name, marks=() if variant(name) == 'xt' else pytest.mark.slow) for name in MODEL_NAMES],
)
def built(request):
    """A configuration and its model; small settings, layers as they are."""
    cfg = load_config(request.param)
    return cfg, build_small(cfg)


def test_trains_one_step_with_a_gradient_for_every_parameter(built):
    cfg, model = built
    width = 64 if cfg.default_scope == 'mmseg' else 96
    losses = model.train()(**model.data_preprocessor(batch(cfg, 64, width), training=True), mode='loss')
    total, logged = model.parse_losses(losses)
    assert all(torch.isfinite(value).all() for value in logged.values()), logged
    assert total > 0
    total.backward()
    # DDP without `find_unused_parameters` needs this of the whole model, not of the backbone alone.
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.backbone.parameters())
    model.zero_grad()


def test_predicts_at_the_original_size(built):
    cfg, model = built
    data = batch(cfg, 64, 96, ori_shape=(32, 48), scale_factor=(2.0, 2.0))
    with torch.no_grad():
        results = model.eval().test_step(data)
    assert len(results) == 2
    for result in results:
        if cfg.default_scope == 'mmseg':
            assert result.pred_sem_seg.shape == result.seg_logits.shape == (32, 48)
            assert len(result.seg_logits.data) == 150
        else:
            predictions = result.pred_instances
            assert len(predictions) == 5
            assert predictions.masks.shape[1:] == (32, 48)
            assert (predictions.bboxes[:, 2] <= 48).all() and (predictions.bboxes[:, 3] <= 32).all()
