"""The network that a state dict is of is told by its tensors alone."""

import pytest
import torch

from overlock import ARCHS, Arch, OverLoCK, OverLoCKBackbone
from overlock.checkpoint import CheckpointError, to_published
from overlock.checkpoint.recognize import recognize
from overlock.models.names import form_of
from tests.testing import MODELS, TINY, in_form

FORMS = ('training', 'merged', 'folded')
# Every field differs from the defaults and from TINY's.
OTHER = Arch((12, 20, 24, 40), (2, 1, 1), 2, (1, 3), (3, 5), (13, 9, 7, 5), (9, 7), 3, 2, 5)


def on_meta(make, form='training'):
    with torch.device('meta'):
        return in_form(make(), form)


def tensors(shapes):
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('kind', ['cls', 'cls_reparam', 'det', 'seg'])
@pytest.mark.parametrize('arch', ARCHS)
def test_published_variants_are_told(arch, kind, prefix, shapes):
    state_dict = {f'{prefix}{name}': value for name, value in tensors(shapes[kind][arch]).items()}
    assert recognize(state_dict).network.arch is ARCHS[arch]


@pytest.mark.parametrize('arch', ARCHS)
def test_folded_variants_are_told(arch):
    assert recognize(on_meta(lambda: OverLoCKBackbone(arch), 'folded')).network.arch is ARCHS[arch]


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('arch', [Arch(**TINY), OTHER], ids=['tiny', 'other'])
def test_an_arch_of_ones_own_is_told_in_every_form(arch, form):
    assert recognize(on_meta(lambda: OverLoCK(arch), form)).network.arch == arch


@pytest.mark.parametrize('indices', [(0,), (0, 1), (2,)], ids=str)
@pytest.mark.parametrize('arch', ['t', 's'])
def test_variants_are_told_by_the_nets_that_are_there(arch, indices):
    state_dict = on_meta(lambda: OverLoCKBackbone(arch, out_indices=indices))
    assert recognize(state_dict).network.arch is ARCHS[arch]


@pytest.mark.parametrize(
    ('kind', 'form', 'published'),
    [
        *((kind, form, False) for kind in MODELS for form in FORMS),
        *((kind, form, True) for kind in ('classifier', 'detection', 'segmentation') for form in FORMS[:2]),
    ],
)
def test_network_of_the_same_shape_is_built_around_the_tensors(kind, form, published):
    expected = on_meta(lambda: MODELS[kind](OTHER, in_channels=5), form)
    given = to_published(expected) if published else expected
    given = {f'backbone.{name}': value for name, value in given.items()} | {'neck.weight': torch.ones(1)}
    model = recognize(given).network
    assert not model.training
    assert {name: (value.shape, value.device.type) for name, value in model.state_dict().items()} == {
        name: (value.shape, 'meta') for name, value in expected.items()
    }
    assert list(model.state_dict()) == list(expected)
    assert form_of(model.state_dict()) == form
    assert isinstance(model, OverLoCK) == kind.startswith('classifier')


def test_counts_of_batches_may_be_missing():
    state_dict = {
        name: value
        for name, value in on_meta(lambda: OverLoCK(TINY, num_classes=7)).items()
        if not name.endswith('num_batches_tracked')
    }
    assert recognize(state_dict).network.head.fc.out_channels == 7


def test_prefix_is_what_stands_before_the_network():
    state_dict = on_meta(lambda: OverLoCKBackbone(TINY))
    for prefix in ('', 'backbone.', 'model.backbone.'):
        given = {f'{prefix}{name}': value for name, value in state_dict.items()}
        assert recognize(given).prefix == prefix
    names = recognize({f'backbone.{name}': value for name, value in to_published(state_dict).items()}).names
    assert names['base_net.stem.1.bn.weight'] == 'backbone.patch_embed1.4.weight'


def without(state_dict, *names):
    return {name: value for name, value in state_dict.items() if not name.startswith(names)}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda d: {}, 'a.pth holds no OverLoCK or MogaNet: expected an entry .*, got nothing; give'),
        (
            lambda d: {'conv1.weight': torch.ones(1)},
            r'holds no OverLoCK or MogaNet: expected .* got conv1.weight; give a file of one',
        ),
        (
            lambda d: d | {f'teacher.{name}': value for name, value in d.items()},
            "holds 2 networks, expected one: below '' and 'teacher.'; give",
        ),
        (
            lambda d: without(d, 'overview_net.stage.0.ffn'),
            r'a.pth is not for the OverLoCKBackbone that .*: 8 tensors missing from the file \(first overview_net',
        ),
        (
            lambda d: d | {'extra.weight': torch.ones(1)},
            r': 1 tensor that the model does not have \(first extra.weight\); give a whole file',
        ),
        (
            lambda d: d | {'base_net.stem.0.bn.bias': torch.ones(1)},
            r': 1 tensor of another shape \(first base_net.stem.0.bn.bias, expected \(4,\), got \(1,\)\); give',
        ),
        (lambda d: d | {'base_net.stem.0.conv.weight': torch.ones(1)}, 'is neither a classifier nor a backbone'),
        (lambda d: without(d, 'output_norms', 'overview_proj', 'overview_scale'), 'expected head.fc or output_norms'),
        (
            lambda d: d | {'base_net.stage1.0.dilated.conv.weight': torch.ones(8, 1, 21, 21)},
            'kernel_size must be one of',
        ),
        (lambda d: d | {'focus_net.stage3.0.rpb_small': torch.ones(3, 9, 9)}, 'divisible by twice focus_groups'),
    ],
)
def test_what_is_not_one_whole_network_is_one_clear_sentence(change, message):
    with pytest.raises(CheckpointError, match=message):
        recognize(change(on_meta(lambda: OverLoCKBackbone(TINY))), 'a.pth')
