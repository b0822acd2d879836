"""MogaNet's weight files: their table, and what becomes of each tensor."""

import copy
import re

import pytest
import torch
from torch import nn

from overlock.checkpoint import WEIGHTS, CheckpointError, load, load_pretrained
from overlock.checkpoint.convert import convert_file
from overlock.checkpoint.recognize import recognize
from overlock.models.moganet import MOGANET_ARCHS, MogaArch, MogaNet, MogaNetBackbone
from tests.testing import MOGANET_TINY, ROOT, TOLERANCES, assert_same, image, randomise, same

TABLE = {name: weights for name, weights in WEIGHTS.items() if weights.network == 'MogaNet'}
RELEASES = 'https://github.com/Westlake-AI/MogaNet/releases/download/'
REFUSED = 'moga_tiny_deit3_sz256_lr2e_3_8xb128_fp16_ep300.pth'


def test_every_published_file_with_a_configuration_has_a_name():
    assert len(TABLE) == len({weights.url for weights in TABLE.values()}) == 8 + 16 + 10
    for name, weights in TABLE.items():
        assert weights.url.startswith(RELEASES) and f'_{weights.arch}_' in name and weights.form == 'training'
        if weights.task != 'classification':
            assert (ROOT / 'configs' / f'{weights.config}.py').is_file() and weights.config.rpartition('_')[0] in name
    urls = {name: weights.url.removeprefix(RELEASES) for name, weights in TABLE.items()}
    assert urls['moganet_xt_256_in1k'] == 'moganet-in1k-weights/moganet_xtiny_sz256_8xbs128_ep300.pth.tar'
    assert urls['moganet_l_in1k'] == 'moganet-in1k-weights/moganet_large_sz224_8xbs64_ep300.pth.tar'
    assert urls['mask_rcnn_moganet_xt_1x_coco'] == 'moganet-det-weights/mask_rcnn_moganet_xtiny_fpn_1x_coco.pth'
    assert urls['mask_rcnn_moganet_b_3x_coco'] == (
        'moganet-det-weights/mask_rcnn_moganet_b_fpn_mstrain_480-800_3x_coco.pth'
    )
    assert urls['cascade_moganet_s_3x_coco'] == (
        'moganet-det-weights/cascade_mask_rcnn_moganet_s_fpn_giou_4conv1f_ms_3x_coco.pth'
    )
    assert urls['retinanet_moganet_l_1x_coco'] == 'moganet-det-weights/retinanet_moganet_large_fpn_1x_coco.pth'
    assert urls['upernet_moganet_t_ade20k'] == 'moganet-seg-weights/upernet_moganet_tiny_512x512_160k_ade20k.pth'
    assert urls['fpn_moganet_s_ade20k'] == 'moganet-seg-weights/fpn_moganet_small_80k_ade20k.pth'


def test_results_are_the_reported_ones():
    results = {name: tuple(weights.metrics.values()) for name, weights in TABLE.items()}
    assert [results[f'moganet_{arch}_in1k'] for arch in MOGANET_ARCHS] == [
        (76.5,), (79.0,), (83.4,), (84.3,), (84.7,), (85.1,)
    ]  # fmt: skip
    assert results['moganet_t_256_in1k'] == (79.6,) and TABLE['moganet_t_256_in1k'].size == 256
    assert {weights.crop_pct for weights in TABLE.values() if weights.task == 'classification'} == {0.9}
    assert results['mask_rcnn_moganet_l_1x_coco'] == (49.4, 44.2)
    assert results['cascade_moganet_b_3x_coco'] == (52.6, 46.0)
    assert TABLE['retinanet_moganet_b_1x_coco'].metrics == {'box_ap': 47.7}
    assert TABLE['upernet_moganet_b_ade20k'].metrics == {'miou': 50.1}
    assert results['fpn_moganet_xt_ade20k'] == (40.3,)


@pytest.mark.parametrize('source', [REFUSED, f'https://example.org/{REFUSED}', f'/somewhere/{REFUSED}'])
def test_file_that_was_trained_with_silu_twice_is_refused_with_the_reason(source):
    with pytest.raises(CheckpointError, match='SiLU applied twice .* take moganet_t_256_in1k'):
        load(source)


@pytest.fixture
def imagenet_file(tmp_path):
    """Write an ImageNet file as the authors' script does; return its path and its tensors."""
    state = randomise(MogaNet(MOGANET_TINY)).state_dict()
    torch.save({'state_dict': state, 'arch': 'moganet_xtiny', 'author': 'them', 'metric': 76.5}, tmp_path / 'a.pth.tar')
    return tmp_path / 'a.pth.tar', state


@pytest.mark.parametrize('deploy', [False, True])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (0, 1)], ids=str)
def test_imagenet_file_loads_into_a_backbone_and_the_head_is_told_as_dropped(imagenet_file, out_indices, deploy):
    path, state = imagenet_file
    model = MogaNetBackbone(MOGANET_TINY, out_indices=out_indices, deploy=deploy)
    report = load_pretrained(model, path)
    assert {'head.weight', 'head.bias'} <= set(report.dropped) and not report.new
    left = (
        {f'{kind}{i}' for i in (3, 4) for kind in ('patch_embed', 'blocks', 'norm')} if len(out_indices) == 2 else set()
    )
    assert {name.partition('.')[0] for name in report.dropped} == {'head'} | left
    assert 'dropped from the file: ' in str(report) and 'head' in str(report)
    expected = MogaNetBackbone(MOGANET_TINY, out_indices=out_indices)
    expected.load_state_dict({name: state[name] for name in expected.state_dict()})
    assert_same(model.eval(), expected.eval(), image(1, 64, 64).float())


def test_backbone_of_a_detector_is_found_below_its_prefix(tmp_path):
    state = randomise(MogaNetBackbone(MOGANET_TINY)).state_dict()
    torch.save({'state_dict': {f'backbone.{name}': value for name, value in state.items()}}, tmp_path / 'detector.pth')
    model = MogaNetBackbone(MOGANET_TINY)
    assert not load_pretrained(model, tmp_path / 'detector.pth').new
    assert same(model.state_dict(), state)


@pytest.mark.parametrize(
    'change', [dict(embed_dims=(8, 16, 24, 32)), dict(depths=(1, 2, 2, 1)), dict(depths=(1, 1, 1, 1))]
)
def test_file_of_another_variant_is_an_error_and_nothing_is_loaded(imagenet_file, change):
    model = MogaNet({**MOGANET_TINY, **change})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match='a.pth.tar is not for this model: .* give the file of the same variant'):
        load_pretrained(model, imagenet_file[0])
    assert same(model.state_dict(), before)


def test_other_classes_are_told(imagenet_file):
    with pytest.raises(CheckpointError, match='build the model with num_classes=1000'):
        load_pretrained(MogaNet(MOGANET_TINY, num_classes=5), imagenet_file[0])


def test_files_of_the_two_networks_are_not_mixed_up(imagenet_file):
    from overlock import OverLoCK
    from tests.testing import TINY

    with pytest.raises(CheckpointError, match='is not for this model'):
        load_pretrained(OverLoCK(TINY), imagenet_file[0])


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_folded_network_loads_the_training_form_strictly_and_not_the_other_way_round(prefix):
    def wrap(network):
        return nn.ModuleDict({'backbone': network}) if prefix else network

    model = randomise(MogaNetBackbone(MOGANET_TINY).double()).eval()
    state = {f'{prefix}{name}': value for name, value in model.state_dict().items()}
    folded = MogaNetBackbone(MOGANET_TINY, deploy=True).double().eval()
    wrap(folded).load_state_dict(state, strict=True)
    assert_same(folded, model, image(1, 64, 64), TOLERANCES[torch.float64])
    with pytest.raises(CheckpointError, match='the state dict has the folded form, out of which no training form'):
        wrap(model).load_state_dict({f'{prefix}{name}': value for name, value in folded.state_dict().items()})


@pytest.mark.parametrize('form', ['training', 'folded'])
@pytest.mark.parametrize('arch', MOGANET_ARCHS)
def test_published_variants_are_recognized(arch, form):
    for model_class, kwargs in ((MogaNet, {}), (MogaNetBackbone, {}), (MogaNetBackbone, {'out_indices': (0, 1, 2)})):
        with torch.device('meta'):
            model = model_class(arch, **kwargs).to_form(form)
        found = recognize({f'a.{name}': value for name, value in model.state_dict().items()})
        assert found.prefix == 'a.' and type(found.network) is model_class
        assert found.network.arch is MOGANET_ARCHS[arch] and found.network.form == form


def test_arch_of_ones_own_is_recognized():
    network = recognize(MogaNet(MOGANET_TINY, in_channels=5, num_classes=3).state_dict()).network
    assert (network.arch, network.in_channels, network.num_classes) == (MogaArch(**MOGANET_TINY), 5, 3)
    with pytest.raises(CheckpointError, match='expected head.fc or output_norms of an OverLoCK, or the stages of a'):
        recognize({'patch_embed1.projection.0.weight': torch.zeros(4, 3, 3, 3)})


def test_file_is_folded_by_the_converter(imagenet_file, tmp_path):
    report = convert_file(imagenet_file[0], tmp_path / 'folded.pth', form='folded')
    assert re.search(
        r'loaded strictly into MogaNet \(an arch of its own, folded form\), outputs .* within', report.verified
    )
    folded = MogaNet(MOGANET_TINY, deploy=True)
    folded.load_state_dict(load(tmp_path / 'folded.pth'), strict=True)
    model = MogaNet(MOGANET_TINY)
    model.load_state_dict(imagenet_file[1])
    assert_same(folded.eval(), model.eval(), image(1, 64, 64).float())
