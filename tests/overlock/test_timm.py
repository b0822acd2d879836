"""timm's interface: what its tests check of a model."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import FeatureInfo, group_parameters, load_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV2
from torch import nn

import overlock.timm
from overlock import ARCHS, OverLoCK
from overlock.checkpoint import WEIGHTS
from overlock.layers import DropPath
from overlock.timm.__main__ import main
from overlock.utils.errors import UserError
from tests.testing import TINY, image, randomise

XT = ['overlock_xt', 'overlock_xt_reparam']
LARGE = [f'overlock_{arch}{suffix}' for arch in 'tsb' for suffix in ('', '_reparam')]
NAMES = [*XT, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
ROOT = Path(overlock.__file__).parent.parent
TINY_CHANNELS = [8, 16, 24, 40]
# Entry point -> published weights.
FILES = {f'overlock_{arch}{suffix}': f'overlock_{arch}_in1k{suffix}' for arch in ARCHS for suffix in ('', '_reparam')}


def create(name: str = 'overlock_xt', **kwargs) -> nn.Module:
    """A model of the same kind, small enough to build in milliseconds, with weights that show every mistake."""
    return randomise(timm.create_model(name, arch=TINY, **kwargs))


def arch_of(name: str) -> str:
    return WEIGHTS[FILES[name]].arch


def logits(model: nn.Module, *images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x in images])


def test_eight_models_are_registered_with_the_published_preprocessing():
    assert set(timm.list_models('overlock_*', module='timm')) == {*XT, *LARGE}
    pretrained = timm.list_models('overlock_*', module='timm', pretrained=True)
    assert set(pretrained) == {f'{name}.in1k' for name in XT + LARGE}
    for name in XT + LARGE:
        cfg, weights = timm.get_pretrained_cfg(name), WEIGHTS[FILES[name]]
        assert (cfg.url, cfg.crop_pct, cfg.interpolation, cfg.mean, cfg.std, cfg.input_size, cfg.num_classes) == (
            weights.url,
            {'xt': 0.925, 't': 0.95, 's': 0.95, 'b': 0.975}[weights.arch],
            'bicubic',
            (0.485, 0.456, 0.406),
            (0.229, 0.224, 0.225),
            (3, 224, 224),
            1000,
        )
        assert weights.form == ('merged' if name.endswith('_reparam') else 'training')
        assert getattr(overlock.timm, name).__name__ == name and name in overlock.timm.__all__


@pytest.mark.parametrize('name', NAMES)
def test_model_is_the_classifier_without_its_auxiliary_head(name):
    model, x = timm.create_model(name, device='meta').eval(), torch.empty(1, 3, 224, 224, device='meta')
    with torch.device('meta'):
        ours = OverLoCK(arch_of(name), aux_head=False, deploy=name.endswith('_reparam'))
    expected = {key: value.shape for key, value in ours.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == expected
    for entry in (model.default_cfg['first_conv'], model.default_cfg['classifier']):
        assert f'{entry}.weight' in expected
    assert resolve_model_data_config(model)['crop_pct'] == WEIGHTS[FILES[name]].crop_pct
    assert model(x).shape == (1, 1000)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for out, info, channels in zip(maps, model.feature_info, model.arch.out_channels, strict=True):
        side = 224 // info['reduction']
        assert out.shape == (1, info['num_chs'], side, side) and info['num_chs'] == channels


@pytest.mark.parametrize('name', XT)
def test_shapes_of_features_and_heads_are_those_that_timm_expects(name):
    factory = {'device': 'meta', 'dtype': torch.bfloat16}
    model, x = timm.create_model(name, **factory).eval(), torch.empty(1, 3, 224, 224, **factory)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *model.default_cfg['pool_size'])
    pooled = model.forward_head(features, pre_logits=True).shape
    assert pooled == (1, model.head_hidden_size)
    assert model(x).shape == (1, model.num_classes) == (1, 1000) and model(x).dtype == torch.bfloat16
    model.reset_classifier(0)
    assert model(x).shape == pooled and model.num_classes == 0
    model.reset_classifier(0, '')
    assert model(x).shape == (1, model.head_hidden_size, *model.default_cfg['pool_size'])
    assert timm.create_model(name, num_classes=0, **factory).eval()(x).shape == pooled
    unpooled = timm.create_model(name, num_classes=0, global_pool='', **factory).eval()
    assert unpooled(x).shape[2:] == model.default_cfg['pool_size']


@pytest.mark.parametrize('name', XT)
def test_forward_and_backward_give_numbers_and_every_parameter_a_gradient(name):
    model, x = timm.create_model(name, num_classes=42), image(2, 64, 96).float()
    out = model.train()(x)
    assert out.shape == (2, 42) and out.isfinite().all()
    out.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert logits(model, x).isfinite().all()


def test_auxiliary_head_gives_its_logits_in_training_and_follows_the_classes():
    model, x = create(aux_head=True, num_classes=5), image(2, 64, 64).float()
    out = model.train()(x)
    assert {key: value.shape for key, value in out.items()} == {'main': (2, 5), 'aux': (2, 5)}
    sum(value.square().sum() for value in out.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.reset_classifier(7)
    assert {value.shape for value in model(x).values()} == {(2, 7)}
    assert logits(model, x).shape == (2, 7)
    assert model.default_cfg['classifier'] == ('head.fc', 'aux_head.fc')
    assert all(f'{entry}.weight' in model.state_dict() for entry in model.default_cfg['classifier'])


@pytest.mark.parametrize('global_pool', ['avg', 'max', 'avgmax', 'catavgmax', 'fast', ''])
def test_pooling_is_chosen_and_kept_by_reset(global_pool):
    model, x = create(global_pool=global_pool, num_classes=5).eval(), image(2, 64, 96).float()
    with torch.no_grad():
        projected = model.head.proj(model.forward_features(x))
        pre_logits = model.forward_head(model.forward_features(x), pre_logits=True)
    avg, largest = projected.mean((2, 3)), projected.amax((2, 3))
    expected = {
        'avg': avg,
        'fast': avg,
        'max': largest,
        'avgmax': (avg + largest) / 2,
        'catavgmax': torch.cat([avg, largest], 1),
        '': projected,
    }[global_pool]
    torch.testing.assert_close(pre_logits, expected)
    assert model.head_hidden_size == expected.shape[1]
    model.reset_classifier(3)
    with torch.no_grad():
        assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), pre_logits)
    assert logits(model, x).shape == (2, 3, *expected.shape[2:])


def test_new_classifier_has_the_place_dtype_and_mode_of_the_model_and_thaws_nothing():
    model = create(num_classes=5, aux_head=True).to('meta', torch.float64).eval().requires_grad_(False)
    model.reset_classifier(0)
    model.reset_classifier(0, '')
    assert not any(p.requires_grad for p in model.parameters())
    model.reset_classifier(2, 'avg')
    fc = model.get_classifier()
    assert fc.weight.shape == (2, 1024, 1, 1) and fc.weight.is_meta and fc.weight.dtype == torch.float64
    assert not any(module.training for module in model.modules())


def test_dropout_acts_before_the_classifier_in_training_alone():
    model, x = create(drop_rate=0.5).train(), image(2, 64, 64).float()
    features = model.forward_features(x).detach()
    dropped = model.forward_head(features, pre_logits=True)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    assert torch.equal(logits(model, x), logits(model, x))


def test_drop_path_rate_is_that_of_the_last_block():
    rates = [module.rate for module in create(drop_path_rate=0.3).modules() if isinstance(module, DropPath)]
    assert max(rates) == 0.3 and min(rates) == 0


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match='not_an_argument'):
        create(not_an_argument=1)


@pytest.mark.parametrize('out_indices', [None, (0, 1), (2,), (-1,), (-3, -1), (3, 0), 2])
@pytest.mark.parametrize('name', XT)
def test_features_are_those_of_the_whole_network(name, out_indices):
    kwargs = {} if out_indices is None else {'out_indices': out_indices}
    whole, x = create(name).eval(), image(1, 65, 97).float()
    net = timm.create_model(name, arch=TINY, features_only=True, **kwargs).eval()
    net.model.load_state_dict(whole.state_dict(), strict=False)
    taken = {None: [0, 1, 2, 3], 2: [2, 3]}.get(out_indices) or [range(4)[i] for i in out_indices]
    with torch.no_grad():
        last, maps = whole.forward_intermediates(x)
        features = net(x)
        selected = whole.forward_intermediates(x, indices=taken, intermediates_only=True)
        assert torch.equal(last, whole.forward_features(x)) and torch.equal(last, maps[3])
    for i, feature, other in zip(taken, features, selected, strict=True):
        torch.testing.assert_close(feature, maps[i], rtol=0, atol=0)
        assert torch.equal(other, maps[i])
        assert feature.shape == (1, TINY_CHANNELS[i], *(-(-side // 2 ** (i + 2)) for side in x.shape[2:]))
    assert net.feature_info.channels() == [TINY_CHANNELS[i] for i in taken]
    assert net.feature_info.reduction() == [2 ** (i + 2) for i in taken]
    assert 'head' not in {key.split('.')[1] for key in net.state_dict()}
    sum(feature.sum() for feature in net.train()(x)).backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('index', range(4))
def test_pruned_model_ends_at_the_output_and_takes_a_new_head(index):
    model, x = create().eval(), image(2, 64, 64).float()
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)[index]
    assert FeatureInfo(model.feature_info, 4).channels() == TINY_CHANNELS
    assert model.prune_intermediate_layers([index]) == [index]
    assert torch.equal(logits(model, x), expected)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), expected)
    model.reset_classifier(7, 'avg')
    assert model.num_features == model.head_hidden_size == TINY_CHANNELS[index]
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    unfolded = model.state_dict()
    folded = copy.deepcopy(model).switch_to_deploy()
    again = create('overlock_xt_reparam')
    again.prune_intermediate_layers([index])
    again.reset_classifier(7, 'avg')
    again.load_state_dict(unfolded)
    assert torch.equal(logits(again, x), logits(folded, x))


def test_pruning_may_leave_the_head():
    model, x = create(num_classes=3), image(1, 64, 64).float()
    expected = logits(model, x)
    assert model.prune_intermediate_layers(1, prune_head=False) == [3]
    assert torch.equal(logits(model, x), expected)


def test_features_have_one_layout():
    with pytest.raises(UserError, match="must be 'NCHW', got 'NHWC'"):
        create().forward_intermediates(image(1, 64, 64).float(), output_fmt='NHWC')


def test_ways_to_features_that_would_miss_some_are_refused():
    with pytest.raises(UserError, match="must be 'getter', which knows all maps of overlock_xt, got 'hook'; leave"):
        create(features_only=True, feature_cls='hook')


@pytest.mark.parametrize('name', XT)
def test_checkpointing_keeps_less_and_changes_no_value(name):
    results, kept = [], []
    for enable in (False, True):
        model, x = create(name, num_classes=3).double().train(), image(2, 64, 64)
        model.set_grad_checkpointing()
        model.set_grad_checkpointing(enable)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            out = model(x)
        out.square().sum().backward()
        kept.append(sum(sizes))
        results.append([out, *(p.grad for p in model.parameters()), *model.buffers()])
    assert kept[1] < kept[0] / 2
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', XT)
def test_layer_decay_rises_block_by_block_from_stem_to_head(name):
    model = timm.create_model(name, device='meta')
    names = {p: key for key, p in model.named_parameters()}
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for p in group['params']:
            scales.setdefault('.'.join(names[p].split('.')[:3]), set()).add(group['lr_scale'])
    assert sum(len(group['params']) for group in param_groups_layer_decay(model)) == len(names)
    assert all(len(each) == 1 for each in scales.values())
    blocks = [
        'base_net.stem.0',
        *(f'base_net.stage{s}.{i}' for s, n in ((1, 2), (2, 2), (3, 3)) for i in range(n)),
        *(f'overview_net.stage.{i}' for i in range(2)),
        *(f'focus_net.stage3.{i}' for i in range(6)),
        *(f'focus_net.stage4.{i}' for i in range(2)),
        'head.fc.weight',
    ]
    order = [scales[key].copy().pop() for key in blocks]
    assert order == [0.5**i for i in reversed(range(len(blocks)))]
    for entry, block in (
        ('base_net.stem.3', 'base_net.stem.0'),
        ('base_net.downsample2.conv', 'base_net.stage2.0'),
        ('overview_net.downsample.conv', 'overview_net.stage.0'),
        ('focus_net.context_proj.weight', 'focus_net.stage3.0'),
        ('focus_net.context_downsample.conv', 'focus_net.stage4.0'),
        ('head.proj.conv', 'head.fc.weight'),
    ):
        assert scales[entry] == scales[block]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) == 8
    assert coarse['base_net.stage3.0.norm.weight'] == coarse['base_net.stage3.2.norm.weight'] == 3


@pytest.mark.parametrize('name', XT)
def test_copies_pickles_and_state_dicts_are_the_same_model(name):
    model, x = create(name, num_classes=3, global_pool='max'), image(1, 64, 64).float()
    twin = timm.create_model(name, arch=TINY, num_classes=3, global_pool='max')
    twin.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin, ModelEmaV2(model).module):
        assert torch.equal(logits(other, x), logits(model, x))


@pytest.mark.slow
def test_compiled_model_is_one_graph():
    torch._dynamo.reset()
    model, x = create(num_classes=3).eval(), image(1, 64, 64).float()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(logits(compiled, x), logits(model, x))


@pytest.mark.slow
def test_training_as_in_timms_script_ends_in_a_checkpoint_that_validation_loads(tmp_path):
    from PIL import Image

    for split in ('train', 'validation'):
        for colour in ('red', 'blue'):
            folder = tmp_path / split / colour
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (40, 40), colour).save(folder / f'{i}.png')
    model = timm.create_model('overlock_xt', arch=TINY, num_classes=2, drop_path_rate=0.1)
    config = {**resolve_model_data_config(model), 'input_size': (3, 32, 32)}

    def loader(split: str):
        dataset = create_dataset('', root=tmp_path, split=split, is_training=split == 'train')
        return create_loader(
            dataset,
            batch_size=4,
            is_training=split == 'train',
            use_prefetcher=False,
            num_workers=0,
            **{key: value for key, value in config.items() if key != 'crop_mode'},
        )

    optimizer = create_optimizer_v2(model, opt='adamw', lr=3e-3, weight_decay=0.05, layer_decay=0.8)
    scheduler, epochs = create_scheduler_v2(optimizer, sched='cosine', num_epochs=6, warmup_epochs=1)
    average = ModelEmaV2(model, decay=0.5)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    for epoch in range(epochs):
        model.train()
        for x, target in loader('train'):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
            average.update(model)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=float(epoch))
    tested = timm.create_model('overlock_xt', arch=TINY, num_classes=2)
    load_checkpoint(tested, str(tmp_path / 'last.pth.tar'), use_ema=True)
    for x, _ in loader('validation'):
        assert torch.equal(logits(tested, x), logits(average.module, x))


@pytest.mark.slow
def test_scripts_of_timm_run_with_the_models(tmp_path):
    (tmp_path / 'beside.py').write_text('NAME = "overlock_xt_reparam"\n')
    (tmp_path / 'script.py').write_text(
        'import argparse, pickle, timm\n'
        'from beside import NAME\n'
        'parser = argparse.ArgumentParser()\n'
        'parser.add_argument("--weights")\n'
        'if __name__ == "__main__":\n'
        '    args = parser.parse_args()\n'
        '    model = timm.create_model(NAME, device="meta")\n'
        '    print(type(model).__module__, len(timm.list_models("overlock*")))\n'
        '    timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=args.weights))\n'
    )

    done = subprocess.run(
        [sys.executable, '-W', 'error::UserWarning', '-m', 'overlock.timm', 'script.py', '--weights', 'nowhere.pth'],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == 'overlock.timm.model 8\n'
    assert done.returncode == 2 and 'nowhere.pth' in done.stderr and 'Traceback' not in done.stderr


def test_missing_script_is_told_in_one_sentence(monkeypatch, capsys):
    for arguments, got in (([], 'nothing'), (['missing.py', '--model', 'overlock_xt'], 'missing.py')):
        monkeypatch.setattr(sys, 'argv', ['timm.py', *arguments])
        with pytest.raises(SystemExit, match='2'):
            main()
        assert capsys.readouterr().err.startswith(f'expected the path of a script, got {got}; those of timm')
