"""Names in both directions, and loading that tells or refuses."""

import pytest
import torch
from torch import nn

from overlock import OverLoCK, OverLoCKBackbone
from overlock.checkpoint import CheckpointError, from_published, load_pretrained, to_published
from tests.testing import TINY, published_weights

ARCHS = ['xt', 't', 's', 'b']
KINDS = {
    'cls': lambda arch: OverLoCK(arch),
    'cls_reparam': lambda arch: OverLoCK(arch).to_form('merged'),
    'det': lambda arch: OverLoCKBackbone(arch),
    'seg': lambda arch: OverLoCKBackbone(arch, overview_residual=False),
}


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('kind', KINDS)
def test_names_translate_both_ways_and_shapes_are_kept(kind, arch, shapes):
    published = {name: tuple(shape) for name, shape in shapes[kind][arch].items()}
    with torch.device('meta'):
        ours = {name: tuple(t.shape) for name, t in KINDS[kind](arch).state_dict().items()}
    assert from_published(published) == ours
    assert to_published(ours) == published
    assert from_published(ours) == ours
    assert to_published(published) == published


def test_names_below_a_prefix_alone_are_translated():
    given = {'backbone.patch_embed2.0.weight': 1, 'neck.patch_embed2.0.weight': 2}
    assert from_published(given, 'backbone.') == {
        'backbone.base_net.downsample2.conv.weight': 1,
        'neck.patch_embed2.0.weight': 2,
    }


def test_published_state_dict_loads_strictly_at_any_prefix(shapes):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = OverLoCKBackbone('xt')
            self.neck = nn.Conv2d(1, 1, 1)

    weights = {f'backbone.{name}': value for name, value in published_weights(shapes['det']['xt']).items()}
    given = {**weights, 'neck.weight': torch.ones(1, 1, 1, 1), 'neck.bias': torch.ones(1)}
    names = list(given)
    detector = Detector()
    detector.load_state_dict(given, strict=True)
    assert list(given) == names, 'the state dict of the caller was changed'
    stem = weights['backbone.patch_embed1.0.weight'].float()
    assert torch.equal(detector.backbone.base_net.stem[0].conv.weight, stem)


def test_imagenet_weights_miss_the_norms_and_projection_and_leave_the_heads(shapes):
    result = OverLoCKBackbone('xt').load_state_dict(published_weights(shapes['cls']['xt']), strict=False)
    missing = {name.rpartition('.')[0] for name in result.missing_keys}
    assert missing == {
        'output_norms.out0',
        'output_norms.out1',
        'output_norms.out2',
        'output_norms.out3',
        'output_norms.overview',
        'overview_proj',
        'overview_scale',
    }
    unexpected = {name.split('.')[0] for name in result.unexpected_keys}
    assert unexpected == {'head', 'aux_head'}


@pytest.mark.parametrize(
    'wrap',
    [
        lambda sd: sd,
        lambda sd: {'state_dict': sd, 'meta': {'epoch': 3}},
        lambda sd: {'model': sd},
        lambda sd: {'state_dict_ema': sd},
        lambda sd: {f'module.{name}': value for name, value in sd.items()},
    ],
)
def test_usual_wrappings_are_taken_off_and_the_report_counts(wrap, shapes, tmp_path):
    weights = published_weights(shapes['cls']['xt'])
    torch.save(wrap(weights), tmp_path / 'weights.pth')
    model = OverLoCKBackbone('xt')
    report = load_pretrained(model, tmp_path / 'weights.pth')
    assert len(report.loaded) == 1549 and len(report.new) == 14 and len(report.dropped) == 15
    assert str(report).startswith('loaded 1549 tensors from ')
    assert '14 (output_norms, overview_proj, overview_scale)' in str(report) and '15 (aux_head, head)' in str(report)
    assert torch.equal(model.focus_net.stage4[1].ls2.bias, weights['sub_blocks4.1.ls2.bias'].float())


def test_backbone_of_a_detector_file_is_found_by_its_prefix(tmp_path):
    model = OverLoCKBackbone(TINY)
    state = {f'backbone.{name}': value for name, value in model.state_dict().items()}
    torch.save({'state_dict': {**state, 'neck.weight': torch.ones(1)}}, tmp_path / 'detector.pth')
    report = load_pretrained(OverLoCKBackbone(TINY), tmp_path / 'detector.pth')
    assert len(report.loaded) == len(state) and not report.new and not report.dropped


def test_fewer_outputs_take_their_part_of_the_weights(shapes, tmp_path):
    torch.save(published_weights(shapes['cls']['xt']), tmp_path / 'weights.pth')
    for out_indices in ((0,), (0, 1), (0, 1, 2)):
        report = load_pretrained(OverLoCKBackbone('xt', out_indices=out_indices), tmp_path / 'weights.pth')
        assert report.loaded and all(name.startswith(('output_norms', 'overview_')) for name in report.new)


def test_file_of_another_variant_is_an_error_and_changes_nothing(shapes, tmp_path):
    torch.save(published_weights(shapes['cls']['xt']), tmp_path / 'xt.pth')
    model = OverLoCKBackbone('t')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match='another shape'):
        load_pretrained(model, tmp_path / 'xt.pth')
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_file_with_more_or_fewer_blocks_is_an_error(tmp_path):
    deep = OverLoCKBackbone({**TINY, 'base_depths': (2, 1, 1)})
    torch.save(deep.state_dict(), tmp_path / 'deep.pth')
    with pytest.raises(CheckpointError, match=r'model does not have \(first base_net.stage1.1'):
        load_pretrained(OverLoCKBackbone(TINY), tmp_path / 'deep.pth')
    torch.save(OverLoCKBackbone(TINY).state_dict(), tmp_path / 'tiny.pth')
    with pytest.raises(CheckpointError, match=r'missing from the file \(first base_net.stage1.1'):
        load_pretrained(deep, tmp_path / 'tiny.pth')


def test_file_of_another_network_is_an_error(tmp_path):
    torch.save({'layer1.weight': torch.ones(1)}, tmp_path / 'resnet.pth')
    with pytest.raises(
        CheckpointError, match=r'missing from the file .* 1 tensor that the model does not have \(first layer1.weight'
    ):
        load_pretrained(OverLoCKBackbone(TINY), tmp_path / 'resnet.pth')


def test_file_of_other_classes_tells_how_many(tmp_path):
    torch.save(OverLoCK(TINY, num_classes=10).state_dict(), tmp_path / 'w.pth')
    with pytest.raises(CheckpointError, match=r'shape \(first head.fc.weight, .*; build the model with num_classes=10'):
        load_pretrained(OverLoCK(TINY, num_classes=7), tmp_path / 'w.pth')
