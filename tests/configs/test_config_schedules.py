"""Learning rates over a whole training, and weight decay by parameter."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope

from overlock.checkpoint import to_published

COCO = {'1x': dict(lr=2e-4, epochs=12, milestones=[8, 11]), '3x': dict(lr=1e-4, epochs=36, milestones=[27, 33])}


def build_schedulers(cfg):
    """One parameter under the optimizer of a configuration, with its schedulers."""
    options = {key: value for key, value in cfg.optim_wrapper.optimizer.items() if key != 'type'}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **options)
    schedulers = [PARAM_SCHEDULERS.build(item, default_args=dict(optimizer=optimizer)) for item in cfg.param_scheduler]
    return optimizer, schedulers


def step(optimizer, schedulers, count: int) -> float:
    optimizer.step()
    for _ in range(count):
        for scheduler in schedulers:
            scheduler.step()
    return optimizer.param_groups[0]['lr']


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
@pytest.mark.parametrize('schedule', ['1x', '3x'])
@pytest.mark.parametrize('head', ['mask_rcnn', 'cascade'])
def test_coco_schedule_follows_the_table(head, schedule, arch, load_config):
    cfg, expected = load_config(f'{head}_overlock_{arch}_{schedule}'), COCO[schedule]
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=expected['lr'], betas=(0.9, 0.999), weight_decay=0.05)
    assert cfg.train_cfg.type == 'EpochBasedTrainLoop'
    assert cfg.train_cfg.max_epochs == expected['epochs']
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.by_epoch, warm_up.begin, warm_up.end, warm_up.start_factor) == (False, 0, 500, 1e-3)
    assert (steps.by_epoch, steps.end, steps.milestones) == (True, expected['epochs'], expected['milestones'])


@pytest.mark.parametrize('schedule', ['1x', '3x'])
def test_coco_learning_rate_over_training(schedule, load_config):
    expected = COCO[schedule]
    optimizer, (warm_up, steps) = build_schedulers(load_config(f'mask_rcnn_overlock_xt_{schedule}'))
    assert optimizer.param_groups[0]['lr'] == pytest.approx(expected['lr'] * 1e-3)
    assert step(optimizer, [warm_up], 499) == pytest.approx(expected['lr'])
    by_epoch = [optimizer.param_groups[0]['lr']]
    by_epoch += [step(optimizer, [steps], 1) for _ in range(expected['epochs'] - 1)]
    first, second = expected['milestones']
    decades = [0] * first + [1] * (second - first) + [2] * (expected['epochs'] - second)
    assert by_epoch == pytest.approx([expected['lr'] * 0.1**decade for decade in decades])


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
def test_ade_schedule_follows_the_table(arch, load_config):
    cfg = load_config(f'upernet_overlock_{arch}_160k')
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('IterBasedTrainLoop', 160000)
    warm_up, poly = cfg.param_scheduler
    assert (warm_up.by_epoch, warm_up.begin, warm_up.end, warm_up.start_factor) == (False, 0, 1500, 1e-6)
    assert (poly.by_epoch, poly.begin, poly.end, poly.power, poly.eta_min) == (False, 1500, 160000, 1.0, 0.0)


def test_ade_learning_rate_over_training(load_config):
    optimizer, schedulers = build_schedulers(load_config('upernet_overlock_xt_160k'))
    assert optimizer.param_groups[0]['lr'] == pytest.approx(6e-5 * 1e-6)
    assert step(optimizer, schedulers, 1499) == pytest.approx(6e-5, rel=1e-3)
    half_way = (160000 - 1500) // 2
    assert step(optimizer, schedulers, 1 + half_way) == pytest.approx(3e-5, rel=1e-3)
    assert step(optimizer, schedulers, 160000 - 1500 - half_way) == pytest.approx(0.0, abs=1e-9)


def split_by_weight_decay(model, optim_wrapper) -> tuple[set, set]:
    """Names of the parameters without weight decay, and of those with the optimizer's own."""
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    base = optim_wrapper.optimizer
    exempt, decayed = set(), set()
    for group in build_optim_wrapper(model, optim_wrapper).optimizer.param_groups:
        assert group['lr'] == base.lr
        assert group['weight_decay'] in (0.0, base.weight_decay)
        (exempt if group['weight_decay'] == 0.0 else decayed).update(names[id(p)] for p in group['params'])
    assert exempt | decayed == set(names.values())
    assert not exempt & decayed
    return exempt, decayed


@pytest.mark.parametrize(
    'name, outputs',
    [
        ('mask_rcnn_overlock_xt_1x', ['out0', 'out1', 'out2', 'out3', 'overview']),
        ('cascade_overlock_xt_3x', ['out0', 'out1', 'out2', 'out3', 'overview']),
        ('upernet_overlock_xt_160k', ['out0', 'out1', 'out2', 'out3']),
    ],
)
def test_only_dynamic_and_output_layer_norms_are_exempt_from_weight_decay(name, outputs, load_config):
    cfg = load_config(name)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.pop('init_cfg')
    model = MODELS.build(cfg.model)
    exempt, decayed = split_by_weight_decay(model, cfg.optim_wrapper)

    # XT has 6 dynamic blocks at 1/16 and 2 at 1/32, each with two LayerNorms.
    blocks = [f'stage3.{index}' for index in range(6)] + [f'stage4.{index}' for index in range(2)]
    norms = [f'focus_net.{block}.{norm}' for block in blocks for norm in ('norm1', 'norm2')]
    norms += [f'output_norms.{output}' for output in outputs]
    assert exempt == {f'backbone.{norm}.{kind}' for norm in norms for kind in ('weight', 'bias')}

    # The same by the authors' rule: every published name that contains `norm`, and no other.
    published = {ours: next(iter(to_published({ours: None}, prefix='backbone.'))) for ours in exempt | decayed}
    assert exempt == {ours for ours, theirs in published.items() if 'norm' in theirs}
