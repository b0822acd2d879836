"""Published weights through timm's `pretrained=True`."""

import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.utils import reparameterize_model

from overlock import OverLoCK
from overlock.checkpoint import WEIGHTS, CheckpointError, to_published
from overlock.layers import DilatedReparamConv
from tests.overlock.test_timm import FILES, LARGE, XT, arch_of, create, logits
from tests.testing import TINY, TOLERANCES, assert_relative, image, published_weights, randomise


def publish(name: str, folder: Path, shapes, dtype: torch.dtype = torch.float64) -> Path:
    """Writes the file that stands for the published weights of an entry point."""
    weights = published_weights(shapes['cls_reparam' if name.endswith('_reparam') else 'cls'][arch_of(name)])
    path = folder / Path(WEIGHTS[FILES[name]].url).name
    torch.save({key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()}, path)
    return path


def network_of(file: Path, arch: str) -> OverLoCK:
    """`OverLoCK` in the form of the file, with its weights and dtype."""
    model, weights = OverLoCK(arch), torch.load(file, weights_only=True)
    if file.stem.endswith('_reparam'):
        for module in model.modules():
            if isinstance(module, DilatedReparamConv):
                module.switch_to_deploy()
    model.to(weights['head.4.weight'].dtype).load_state_dict(weights)
    return model.eval()


@pytest.fixture(scope='module')
def weights_folder(shapes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('weights')
    for name in XT:
        publish(name, folder, shapes)
    return folder


@pytest.fixture
def published(weights_folder, monkeypatch, tmp_path) -> Path:
    """The folder with XT's files, from which `pretrained=True` reads; there is no other."""
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(weights_folder))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    return weights_folder


def test_features_are_the_maps_that_the_published_classifier_has_inside(published):
    net = timm.create_model('overlock_xt', features_only=True, pretrained=True, dtype=torch.float64).eval()
    seen = {}
    reference = network_of(published / 'overlock_xt_in1k_224.pth', 'xt')
    for key in ('base_net.stage1.1', 'base_net.stage2.1', 'focus_net.stage3.5', 'focus_net.stage4.1'):
        reference.get_submodule(key).register_forward_hook(lambda module, args, out, key=key: seen.update({key: out}))
    with torch.no_grad():
        reference(image(1, 96, 64))
        features = net(image(1, 96, 64))
    for feature, out in zip(features, seen.values(), strict=True):
        assert_relative(feature, torch.cat(out, 1) if isinstance(out, tuple) else out, TOLERANCES[torch.float64])


def test_pretrained_model_gives_the_published_logits(published, golden):
    model = timm.create_model('overlock_xt', pretrained=True, dtype=torch.float64)
    assert_relative(logits(model, image(1, 224, 224)), golden['cls/xt/224x224/logits'], TOLERANCES[torch.float64])


@pytest.mark.parametrize(
    'name', ['overlock_xt_reparam', *(pytest.param(name, marks=pytest.mark.slow) for name in ('overlock_xt', *LARGE))]
)
def test_published_file_of_every_form_loads_whole(name, shapes, tmp_path, monkeypatch):
    file = publish(name, tmp_path, shapes, torch.float32)
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path))
    x = image(1, 64, 96).float()
    expected = logits(network_of(file, arch_of(name)), x)
    assert_relative(logits(timm.create_model(name, pretrained=True), x), expected, TOLERANCES[torch.float32])


def test_folded_model_takes_the_training_file_and_timm_folds_a_training_model(published, golden):
    file = published / 'overlock_xt_in1k_224.pth'
    overlay = {'file': str(file)}
    expected = golden['cls/xt/160x224/logits']
    folded = timm.create_model(
        'overlock_xt_reparam', pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64
    )
    assert_relative(logits(folded, image(1, 160, 224)), expected, TOLERANCES[torch.float64])
    by_timm = reparameterize_model(timm.create_model('overlock_xt', pretrained=True, dtype=torch.float64).eval())
    assert by_timm.state_dict().keys() == folded.state_dict().keys()
    assert_relative(logits(by_timm, image(1, 160, 224)), expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize('name', ['overlock_xt_reparam', pytest.param('overlock_xt', marks=pytest.mark.slow)])
def test_grey_images_and_other_classes_keep_the_rest_of_the_weights(name, published):
    grey = image(2, 64, 64)[:, :1]
    model = timm.create_model(name, pretrained=True, dtype=torch.float64, in_chans=1, num_classes=10)
    plain = timm.create_model(name, pretrained=True, dtype=torch.float64, num_classes=0)
    assert logits(model, grey).shape == (2, 10)
    model.reset_classifier(0)
    # timm adds the three channels up in float32.
    assert_relative(logits(model, grey), logits(plain, grey.expand(-1, 3, -1, -1)), TOLERANCES[torch.float32])


@pytest.mark.parametrize('name', XT)
def test_four_channels_load_and_both_heads_are_new_for_other_classes(name, tmp_path):
    torch.save(to_published(randomise(OverLoCK(TINY)).state_dict()), tmp_path / 'weights.pth')
    kwargs = {
        'arch': TINY,
        'aux_head': True,
        'pretrained': True,
        'pretrained_cfg_overlay': {'file': str(tmp_path / 'weights.pth')},
    }
    model = timm.create_model(name, in_chans=4, num_classes=10, **kwargs)
    own, whole = model.state_dict(), timm.create_model(name, **kwargs).state_dict()
    new = {key for key in own if own[key].shape != whole[key].shape or not torch.equal(own[key], whole[key])}
    assert new == {
        'base_net.stem.0.conv.weight',
        *(f'{head}.fc.{part}' for head in ('head', 'aux_head') for part in ('weight', 'bias')),
    }
    outs = model.train()(torch.randn(2, 4, 64, 64))
    assert {value.shape for value in outs.values()} == {(2, 10)}


def test_auxiliary_head_is_loaded_where_the_model_has_it(published, shapes):
    model = timm.create_model('overlock_xt', pretrained=True, aux_head=True, dtype=torch.float64)
    weights = published_weights(shapes['cls']['xt'])
    assert torch.equal(model.aux_head.bn.running_mean, weights['aux_head.0.running_mean'])
    assert torch.equal(model.aux_head.fc.weight, weights['aux_head.2.weight'])


def test_files_of_ones_own_load_with_their_classes_or_with_new_ones(tmp_path):
    tuned, x = create(num_classes=3), image(1, 64, 64).float()
    torch.save({'state_dict': tuned.state_dict(), 'epoch': 1}, tmp_path / 'tuned.pth')
    file = {'file': str(tmp_path / 'tuned.pth')}
    same = timm.create_model(
        'overlock_xt', arch=TINY, pretrained=True, num_classes=3, pretrained_cfg_overlay={**file, 'num_classes': 3}
    )
    assert torch.equal(logits(same, x), logits(tuned, x))
    # timm's scripts say -1 for --pretrained-path.
    new = timm.create_model(
        'overlock_xt', arch=TINY, pretrained=True, num_classes=3, pretrained_cfg_overlay={**file, 'num_classes': -1}
    )
    assert not torch.equal(new.head.fc.weight, tuned.head.fc.weight)
    assert torch.equal(new.head.proj.conv.weight, tuned.head.proj.conv.weight)
    by_path = timm.create_model('overlock_xt', arch=TINY, num_classes=3, checkpoint_path=tmp_path / 'tuned.pth')
    assert torch.equal(logits(by_path, x), logits(tuned, x))


def test_sources_that_timm_reads_itself_load_too(shapes, tmp_path, published):
    x = image(1, 64, 64).float()
    expected = logits(timm.create_model('overlock_xt', pretrained=True), x)
    weights = published_weights(shapes['cls']['xt'])
    for kwargs in (
        {'pretrained': True, 'pretrained_cfg_overlay': {'state_dict': weights}},
        {'checkpoint_path': str(published / 'overlock_xt_in1k_224.pth')},
    ):
        assert torch.equal(logits(timm.create_model('overlock_xt', **kwargs), x), expected)
    grey = timm.create_model(
        'overlock_xt', pretrained=True, in_chans=1, num_classes=2, pretrained_cfg_overlay={'state_dict': weights}
    )
    stem = weights['patch_embed1.0.weight'].float().sum(1, keepdim=True)
    torch.testing.assert_close(grey.base_net.stem[0].conv.weight, stem)
    save_for_hf(timm.create_model('overlock_xt', pretrained=True), tmp_path / 'saved')
    assert torch.equal(logits(timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True), x), expected)


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 10}, {'in_chans': 1}, {'features_only': True}], ids=str)
def test_file_of_another_variant_is_an_error(kwargs, shapes, tmp_path):
    torch.save(OverLoCK({**TINY, 'embed_dims': (16, 16, 16, 32)}).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='other.pth is not for this model: .* another shape'):
        timm.create_model(
            'overlock_xt',
            arch=TINY,
            pretrained=True,
            pretrained_cfg_overlay={'file': str(tmp_path / 'other.pth')},
            **kwargs,
        )


@pytest.mark.parametrize('kwargs', [{'num_classes': 10}, {'features_only': True}], ids=str)
def test_file_with_gaps_is_an_error_even_where_timm_would_not_ask(kwargs, tmp_path):
    gaps = {key: value for key, value in OverLoCK(TINY).state_dict().items() if 'stage3.0' not in key}
    torch.save(gaps, tmp_path / 'gaps.pth')
    with pytest.raises(CheckpointError, match=r'missing from the file \(first base_net.stage3.0'):
        timm.create_model(
            'overlock_xt',
            arch=TINY,
            pretrained=True,
            pretrained_cfg_overlay={'file': str(tmp_path / 'gaps.pth')},
            **kwargs,
        )


def test_missing_and_malicious_files_are_refused(tmp_path, monkeypatch):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'pwned'),)

    (tmp_path / 'overlock_xt_in1k_224.pth').write_bytes(pickle.dumps(Attack(), protocol=2))
    monkeypatch.setenv('OVERLOCK_WEIGHTS', str(tmp_path))
    with pytest.raises(CheckpointError):
        timm.create_model('overlock_xt', pretrained=True)
    assert not (tmp_path / 'pwned').exists()
    with pytest.raises(CheckpointError, match='nowhere.pth'):
        timm.create_model('overlock_xt', pretrained=True, pretrained_cfg_overlay={'file': 'nowhere.pth'})
