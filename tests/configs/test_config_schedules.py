"""Learning rates over a whole training, and weight decay by parameter."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from overlock.checkpoint import to_published
from tests.configs.testing import VARIANTS, build_meta, learning_rates, load_config, warm_up

# The learning rate of each head, epochs, and the epochs after which the rate falls.
COCO = {
    '1x': (dict(mask_rcnn=2e-4, cascade=1e-4), 12, (8, 11)),
    '3x': (dict(mask_rcnn=1e-4, cascade=1e-4), 36, (27, 33)),
}


@pytest.mark.parametrize('arch', VARIANTS)
@pytest.mark.parametrize('schedule', ['1x', '3x'])
@pytest.mark.parametrize('head', ['mask_rcnn', 'cascade'])
def test_coco_optimizer_and_length_follow_the_table(head, schedule, arch):
    cfg, (rates, epochs, _) = load_config(f'{head}_overlock_{arch}_{schedule}'), COCO[schedule]
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=rates[head], betas=(0.9, 0.999), weight_decay=0.05)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('EpochBasedTrainLoop', epochs)


@pytest.mark.parametrize('schedule', ['1x', '3x'])
@pytest.mark.parametrize('head', ['mask_rcnn', 'cascade'])
def test_coco_learning_rate_follows_the_authors_formula(head, schedule):
    (rates, epochs, milestones), epoch = COCO[schedule], 600
    iterations = torch.arange(epochs * epoch, dtype=torch.float64)
    decades = sum((iterations >= milestone * epoch).double() for milestone in milestones)
    expected = rates[head] * 0.1**decades * warm_up(iterations, 500, 1e-3)
    actual = learning_rates(load_config(f'{head}_overlock_xt_{schedule}'), len(iterations), epoch)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize('arch', VARIANTS)
def test_ade_optimizer_and_length_follow_the_table(arch):
    cfg = load_config(f'upernet_overlock_{arch}_160k')
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    assert (cfg.train_cfg.type, cfg.train_cfg.max_iters) == ('IterBasedTrainLoop', 160000)


def test_ade_learning_rate_follows_the_authors_formula():
    iterations = torch.arange(160000, dtype=torch.float64)
    expected = 6e-5 * (1 - iterations / 160000) * warm_up(iterations, 1500, 1e-6)
    actual = learning_rates(load_config('upernet_overlock_xt_160k'), len(iterations), epoch=1263)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


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
def test_only_dynamic_and_output_layer_norms_are_exempt_from_weight_decay(name, outputs):
    cfg = load_config(name)
    exempt, decayed = split_by_weight_decay(build_meta(cfg), cfg.optim_wrapper)

    # XT has 6 dynamic blocks at 1/16 and 2 at 1/32, each with two LayerNorms.
    blocks = [f'stage3.{index}' for index in range(6)] + [f'stage4.{index}' for index in range(2)]
    norms = [f'focus_net.{block}.{norm}' for block in blocks for norm in ('norm1', 'norm2')]
    norms += [f'output_norms.{output}' for output in outputs]
    assert exempt == {f'backbone.{norm}.{kind}' for norm in norms for kind in ('weight', 'bias')}

    # The same by the authors' rule: every published name that contains `norm`, and no other.
    published = {ours: next(iter(to_published({ours: None}, prefix='backbone.'))) for ours in exempt | decayed}
    assert exempt == {ours for ours, theirs in published.items() if 'norm' in theirs}
