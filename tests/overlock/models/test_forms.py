"""A folded network loads state dicts of every form, and says what is wrong with one that it cannot take."""

import copy

import pytest
import torch
from torch import nn

from overlock import OverLoCK, OverLoCKBackbone
from overlock.checkpoint import CheckpointError, load_pretrained, to_published
from overlock.models.names import form_of
from tests.testing import (
    MODELS,
    TINY,
    TOLERANCES,
    assert_relative,
    assert_same,
    image,
    in_form,
    published_weights,
    randomise,
    same,
)

KINDS = ('classifier', 'detection', 'segmentation', 'outputs (0,)')


@pytest.mark.parametrize('kind', KINDS)
def test_forms_are_told_by_names(kind):
    model = MODELS[kind]()
    for form in ('training', 'merged', 'folded'):
        assert form_of(in_form(model, form)) == form
    assert form_of(['neck.weight', 'layer1.0.conv1.weight']) is None


@pytest.mark.parametrize('published', [False, True], ids=['our names', 'published names'])
@pytest.mark.parametrize('form', ['training', 'merged'])
@pytest.mark.parametrize('kind', KINDS)
def test_folded_model_loads_unfolded_forms_strictly(kind, form, published):
    model = randomise(MODELS[kind]().double()).eval()
    state = in_form(model, form)
    given = to_published(state) if published else dict(state)
    kept = {name: value.clone() for name, value in given.items()}
    built = MODELS[kind](deploy=True).double().eval()
    result = built.load_state_dict(given, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same(built, model, image(1, 64, 64), TOLERANCES[torch.float64])
    assert same(given, kept), 'the state dict of the caller was changed'


@pytest.mark.parametrize('form', ['training', 'merged', 'folded'])
def test_folded_backbone_of_a_detector_loads_at_its_prefix(form):
    model = randomise(OverLoCKBackbone(TINY)).eval()
    detector = nn.ModuleDict({'backbone': OverLoCKBackbone(TINY, deploy=True), 'neck': nn.Conv2d(1, 1, 1)}).eval()
    given = {f'backbone.{name}': value for name, value in in_form(model, form).items()}
    given |= {'neck.weight': torch.full((1, 1, 1, 1), 3.0), 'neck.bias': torch.zeros(1)}
    detector.load_state_dict(given, strict=True)
    assert detector['neck'].weight.item() == 3
    assert_same(detector['backbone'], model, image(1, 64, 64).float())


@pytest.mark.parametrize('arch', ['xt', *(pytest.param(arch, marks=pytest.mark.slow) for arch in 'tsb')])
def test_folded_model_loads_published_reparameterised_names_strictly(arch, shapes):
    weights = published_weights(shapes['cls_reparam'][arch])
    model = OverLoCK(arch, deploy=True).double().eval()
    result = model.load_state_dict(weights, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    with torch.device('meta'):
        merged = OverLoCK(arch).to_form('merged').eval()
    merged.load_state_dict(weights, strict=True, assign=True)
    assert_same(model, merged, image(1, 32, 64), TOLERANCES[torch.float64])


@pytest.mark.parametrize('kind', ['cls', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('det', 'seg'))])
def test_folded_model_gives_the_published_numbers(kind, shapes, golden):
    model = (
        OverLoCK('xt', deploy=True)
        if kind == 'cls'
        else OverLoCKBackbone('xt', overview_residual=kind == 'det', deploy=True)
    )
    model = model.double().eval()
    model.load_state_dict(published_weights(shapes[kind]['xt']), strict=True)
    with torch.no_grad():
        outs = model(image(1, 224, 224))
    if kind == 'cls':
        assert_relative(outs, golden['cls/xt/224x224/logits'], TOLERANCES[torch.float64])
        return
    for i, out in enumerate(outs):
        flat, expected = out.flatten(), golden[f'{kind}/xt/224x224/out{i}/sample']
        assert_relative(flat[:: max(1, flat.numel() // 4096)], expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize('published', [False, True], ids=['our names', 'published names'])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_gaps_in_a_part_that_has_to_be_folded_are_refused_and_nothing_is_loaded(prefix, published):
    state = randomise(OverLoCKBackbone(TINY)).state_dict()
    del state['base_net.stem.1.bn.running_var'], state['overview_scale.bias']
    given = {f'{prefix}{name}': value for name, value in (to_published(state) if published else state).items()}
    model = OverLoCKBackbone(TINY, deploy=True)
    before = copy.deepcopy(model.state_dict())
    message = r'^the state dict has the training form and lacks 2 tensors \(first base_net.stem.1.bn.running_var\), '
    with pytest.raises(CheckpointError, match=message + '.* folded form of the model; give a whole file'):
        (nn.ModuleDict({'backbone': model}) if prefix else model).load_state_dict(given, strict=False)
    assert same(model.state_dict(), before)


def test_parts_that_a_file_lacks_as_a_whole_stay_as_they_are_and_are_told():
    state = randomise(OverLoCK(TINY)).state_dict()
    model = OverLoCKBackbone(TINY, deploy=True)
    before = copy.deepcopy(model.state_dict())
    result = model.load_state_dict(state, strict=False)
    assert {name.partition('.')[0] for name in result.missing_keys} == {'output_norms', 'overview_proj'}
    assert {name.partition('.')[0] for name in result.unexpected_keys} == {'head', 'aux_head'}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in result.missing_keys), name


def test_entry_of_another_shape_is_an_error():
    given = to_published(randomise(OverLoCKBackbone(TINY)).state_dict())
    given['patch_embed1.1.running_mean'] = torch.zeros(7)
    with pytest.raises(RuntimeError, match='size mismatch for base_net.stem.0.bn.running_mean: .*7'):
        OverLoCKBackbone(TINY, deploy=True).load_state_dict(given, strict=False)


def test_loading_keeps_the_parameters_that_an_optimizer_holds():
    model = OverLoCKBackbone(TINY, deploy=True)
    held = list(model.parameters())
    model.load_state_dict(randomise(OverLoCKBackbone(TINY)).state_dict())
    assert all(own is kept for own, kept in zip(model.parameters(), held, strict=True))


def test_counts_of_batches_are_not_needed():
    state = OverLoCKBackbone(TINY).state_dict()
    given = {name: value for name, value in state.items() if not name.endswith('num_batches_tracked')}
    assert not OverLoCKBackbone(TINY, deploy=True).load_state_dict(given, strict=True).missing_keys


def test_half_precision_file_is_folded_with_the_digits_of_the_model():
    model = randomise(OverLoCKBackbone(TINY)).half().float().eval()
    built = OverLoCKBackbone(TINY, deploy=True).eval()
    built.load_state_dict(copy.deepcopy(model).half().state_dict())
    assert_same(built, model, image(1, 64, 64).float())


def test_what_a_subclass_adds_is_loaded_too():
    class WithExtra(OverLoCKBackbone):
        def __init__(self, **kwargs):
            super().__init__(TINY, **kwargs)
            self.extra = nn.Linear(2, 2)

    state = randomise(WithExtra()).state_dict()
    model = WithExtra(deploy=True)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model.extra.weight, state['extra.weight'])
    del state['extra.weight']
    assert model.load_state_dict(state, strict=False).missing_keys == ['extra.weight']


def test_meta_model_is_filled_by_assignment():
    model = randomise(OverLoCKBackbone(TINY)).eval()
    with torch.device('meta'):
        built = OverLoCKBackbone(TINY, deploy=True).eval()
    built.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert_same(built, model, image(1, 64, 64).float())


def test_loading_draws_no_random_numbers():
    state, model = OverLoCKBackbone(TINY).state_dict(), OverLoCKBackbone(TINY, deploy=True)
    before = torch.get_rng_state()
    model.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('form', ['merged', 'folded'])
@pytest.mark.parametrize('strict', [True, False])
def test_training_form_refuses_other_forms_and_stays_as_it_is(form, strict, tmp_path):
    given = in_form(randomise(OverLoCKBackbone(TINY)), form)
    model = OverLoCKBackbone(TINY)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=f'^the state dict has the {form} form, .* build the model with deploy=T'):
        model.load_state_dict(given, strict=strict)
    torch.save(given, tmp_path / 'weights.pth')
    with pytest.raises(CheckpointError, match=f'weights.pth has the {form} form, out of which no training form'):
        load_pretrained(model, tmp_path / 'weights.pth')
    assert same(model.state_dict(), before)


@pytest.mark.parametrize('form', ['training', 'merged', 'folded'])
def test_report_on_a_folded_model_has_the_names_of_the_file(form, tmp_path):
    classifier = randomise(OverLoCK(TINY))
    state = in_form(classifier, form)
    torch.save(state, tmp_path / 'weights.pth')
    model = OverLoCKBackbone(TINY, deploy=True)
    report = load_pretrained(model, tmp_path / 'weights.pth')
    assert set(report.loaded) == {name for name in state if not name.startswith(('head.', 'aux_head.'))}
    assert set(report.dropped) == {name for name in state if name.startswith(('head.', 'aux_head.'))}
    assert all(name.startswith(('output_norms.', 'overview_proj.', 'overview_scale.')) for name in report.new)
    assert (model.output_norms['out0'].weight == 1).all()
    folded = classifier.switch_to_deploy()
    assert torch.equal(model.focus_net.stage4[0].proj[1].weight, folded.focus_net.stage4[0].proj[1].weight)
    with pytest.raises(CheckpointError, match=r'missing from the file \(first base_net.stage1.1'):
        load_pretrained(OverLoCKBackbone({**TINY, 'base_depths': (2, 1, 1)}, deploy=True), tmp_path / 'weights.pth')


def test_folded_state_dict_has_no_published_names():
    with pytest.raises(CheckpointError, match='has the folded form .* no published names'):
        to_published(OverLoCKBackbone(TINY, deploy=True).state_dict())
