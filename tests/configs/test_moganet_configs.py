"""MogaNet's configurations against a table typed from the published settings, then built, run forward and backward."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from overlock.models.moganet import MOGANET_ARCHS
from tests.configs.testing import CONFIGS, batch, build_meta, build_small, learning_rates, load_config, warm_up

# Architecture and schedule -> drop path rate, learning rate.
MASK_RCNN = {
    ('xt', '1x'): (0.05, 2e-4),
    ('t', '1x'): (0.1, 2e-4),
    ('s', '1x'): (0.1, 2e-4),
    ('b', '1x'): (0.2, 1e-4),
    ('l', '1x'): (0.3, 1e-4),
    ('t', '3x'): (0.1, 2e-4),
    ('s', '3x'): (0.1, 2e-4),
    ('b', '3x'): (0.3, 2e-4),
    ('l', '3x'): (0.3, 2e-4),
}
CASCADE = {('s', '3x'): (0.1, 2e-4), ('b', '3x'): (0.2, 1e-4), ('l', '3x'): (0.3, 1e-4)}
RATES = {'xt': 0.05, 't': 0.1, 's': 0.1, 'b': 0.2, 'l': 0.3, 'xl': 0.4}
RETINANET = {(arch, '1x'): (RATES[arch], 1e-4) for arch in ('xt', 't', 's', 'b', 'l')}
UPERNET = {(arch, '160k'): (RATES[arch], 1e-4) for arch in RATES}
FPN = {(arch, '80k'): (RATES[arch], 2e-4) for arch in ('xt', 't', 's', 'b', 'l')}

TABLE = {
    f'{head}_moganet_{arch}_{schedule}': (arch, *settings)
    for head, table in (
        ('mask_rcnn', MASK_RCNN),
        ('cascade', CASCADE),
        ('retinanet', RETINANET),
        ('upernet', UPERNET),
        ('fpn', FPN),
    )
    for (arch, schedule), settings in table.items()
}
LAYER_DECAY = ('cascade_moganet_b_3x', 'cascade_moganet_l_3x')
# One of each head and schedule.
RECIPES = [
    'mask_rcnn_moganet_xt_1x',
    'mask_rcnn_moganet_t_3x',
    'cascade_moganet_s_3x',
    'retinanet_moganet_xt_1x',
    'upernet_moganet_xt_160k',
    'fpn_moganet_xt_80k',
]


def test_exactly_the_published_configurations_are_shipped():
    assert {path.stem for path in CONFIGS.glob('*moganet*.py')} == set(TABLE)


@pytest.mark.parametrize('name', TABLE)
def test_settings_match_the_table(name):
    cfg, (arch, rate, lr) = load_config(name), TABLE[name]
    assert cfg.model.backbone == dict(
        type='MogaNet',
        arch=arch,
        drop_path_rate=rate,
        init_cfg=dict(type='Pretrained', checkpoint=f'moganet_{arch}_in1k'),
    )
    assert cfg.optim_wrapper.optimizer.lr == lr
    assert cfg.optim_wrapper.get('constructor') == (
        'LayerDecayOptimWrapperConstructor' if name in LAYER_DECAY else None
    )
    assert 'clip_grad' not in cfg.optim_wrapper
    # The authors' backbones kept the statistics of each process.
    assert cfg.sync_bn is None
    toolbox = 'mmseg' if name.startswith(('upernet', 'fpn')) else 'mmdet'
    assert cfg.default_scope == toolbox and cfg.custom_imports.imports == [f'{toolbox}_overlock']
    batch_size, total = (4, 32) if name.startswith('fpn') else (2, 16)
    assert (cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size) == (batch_size, total)
    assert cfg.default_hooks.checkpoint.interval == cfg.train_cfg.val_interval


@pytest.mark.parametrize('name', RECIPES)
def test_optimizer_and_learning_rate_follow_the_authors_formula(name):
    cfg = load_config(name)
    decay = {'upernet': 0.01, 'fpn': 1e-4}.get(name.partition('_')[0], 0.05)
    lr = TABLE[name][2]
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=decay)
    if cfg.default_scope == 'mmseg':
        length, epoch = cfg.train_cfg.max_iters, 1000
        iterations = torch.arange(length, dtype=torch.float64)
        warmed = warm_up(iterations, 1500, 1e-6) if name.startswith('upernet') else 1
        expected = lr * (1 - iterations / length) ** (1.0 if name.startswith('upernet') else 0.9) * warmed
        assert length == (160000 if name.startswith('upernet') else 80000)
    else:
        epochs, milestones, epoch = *((12, (8, 11)) if name.endswith('1x') else (36, (27, 33))), 600
        assert cfg.train_cfg.max_epochs == epochs
        iterations = torch.arange(epochs * epoch, dtype=torch.float64)
        decades = sum((iterations >= milestone * epoch).double() for milestone in milestones)
        expected = lr * 0.1**decades * warm_up(iterations, 1000 if name.startswith('cascade') else 500, 1e-3)
    torch.testing.assert_close(learning_rates(cfg, len(iterations), epoch), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize('name', [*RECIPES, 'cascade_moganet_b_3x'])
def test_parameter_groups_are_the_published_ones(name):
    cfg = load_config(name)
    model = build_meta(cfg)
    base = cfg.optim_wrapper.optimizer
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    found = {id(p): (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    assert len(found) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        lr, decay = found[id(parameter)]
        if name in LAYER_DECAY:
            exempt = parameter.squeeze().ndim <= 1 or key.endswith('.bias')
            assert (lr < base.lr) == (key.startswith('backbone.') and not key.startswith('backbone.norm')), key
        else:
            exempt = not name.startswith('fpn') and any(part in key for part in ('layer_scale', 'scale', 'norm'))
            assert lr == base.lr
        assert decay == (0.0 if exempt else base.weight_decay), key


@pytest.mark.parametrize('name', RECIPES)
def test_images_are_prepared_as_by_the_authors(name):
    cfg = load_config(name)
    train = [step['type'] for step in cfg.train_dataloader.dataset.pipeline]
    test = {step['type']: step for step in cfg.test_dataloader.dataset.pipeline}
    assert cfg.val_dataloader.dataset.pipeline == cfg.test_dataloader.dataset.pipeline
    if cfg.default_scope == 'mmseg':
        assert test['ResizeToMultiple'] == dict(type='ResizeToMultiple', size_divisor=32, interpolation='bilinear')
        assert test['Resize'].scale == (2048, 512)
        views = cfg.tta_pipeline[1].transforms[1]
        assert views == [test['ResizeToMultiple']]
    else:
        assert ('RandomChoice' in train) == name.endswith('3x')
        assert test['Resize'].scale == (1333, 800)
        masks = not name.startswith('retinanet')
        assert test['LoadAnnotations'].get('with_mask', False) == masks
        assert cfg.test_evaluator.metric == cfg.val_evaluator.metric == (['bbox', 'segm'] if masks else 'bbox')


@pytest.mark.parametrize('name', [name for name in TABLE if not name.startswith('cascade')])
def test_backbone_feeds_neck_and_heads(name):
    cfg = load_config(name)
    model, image = build_meta(cfg).eval(), torch.zeros(1, 3, 64, 128, device='meta')
    assert model.backbone.out_channels == MOGANET_ARCHS[TABLE[name][0]].embed_dims
    maps = model.extract_feat(image)
    if cfg.default_scope == 'mmseg':
        assert model.decode_head(maps).shape == (1, 150, 16, 32)
        if name.startswith('upernet'):
            assert model.auxiliary_head(maps).shape == (1, 150, 4, 8)
    else:
        assert [x.shape[1:] for x in maps][:2] == (
            [(256, 8, 16), (256, 4, 8)] if name.startswith('retinanet') else [(256, 16, 32), (256, 8, 16)]
        )


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name.startswith(('retinanet', 'fpn')) else pytest.mark.slow)
        for name in (
            'mask_rcnn_moganet_xt_1x',
            'retinanet_moganet_xt_1x',
            'upernet_moganet_xt_160k',
            'fpn_moganet_xt_80k',
        )
    ],
)
def test_trains_one_step_and_predicts(name):
    cfg = load_config(name)
    model = build_small(cfg)
    width = 64 if cfg.default_scope == 'mmseg' else 96
    losses = model.train()(**model.data_preprocessor(batch(cfg, 64, width), training=True), mode='loss')
    total, _ = model.parse_losses(losses)
    assert torch.isfinite(total) and total > 0
    total.backward()
    # DDP without `find_unused_parameters` needs this of the whole model.
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
    data = batch(cfg, 64, width, ori_shape=(32, width // 2), scale_factor=(2.0, 2.0))
    with torch.no_grad():
        results = model.eval().test_step(data)
    assert len(results) == 2
    if cfg.default_scope == 'mmseg':
        assert results[0].pred_sem_seg.shape == (32, width // 2)
