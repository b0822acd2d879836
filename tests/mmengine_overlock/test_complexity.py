"""Parameters and multiply-adds are those that the formulas give."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmengine_overlock.complexity import count, count_config
from overlock import OverLoCK, OverLoCKBackbone
from overlock.layers import DilatedReparamConv
from overlock.layers.large_kernel import BRANCHES
from overlock.models.blocks import DynamicBlock
from overlock.ops.contmix.complexity import multiply_adds
from overlock.utils.errors import UserError
from tests.testing import ROOT, TINY

OPTIONS = {'model.backbone.arch': {**TINY, '_delete_': True}, 'model.backbone.init_cfg': None}
DETECTOR = {
    **OPTIONS,
    'model.neck.in_channels': [8, 16, 24, 40],
    'model.test_cfg.rpn.max_per_img': 60,
    'model.test_cfg.rcnn.max_per_img': 7,
}
SEGMENTER = {**OPTIONS, 'model.decode_head.in_channels': [8, 16, 24, 40], 'model.auxiliary_head.in_channels': 24}


def by_taps(height, width, groups, dims, small, large) -> int:
    """Count ContMix as it is defined: for every pixel, group and tap a logit, and a share in the sum."""
    count = 0
    for _pixel in range(height * width):
        for _group in range(groups):
            for size in (small, large):
                for _tap in range(size**2):
                    count += dims  # query . kernel
                    count += dims  # weight * value
    return count


def test_contmix_counts_two_products_a_tap():
    height, width, groups, dims, small, large = 4, 5, 2, 3, 3, 5
    query, kernel = (1, groups * dims, height, width), (1, groups, dims, small**2 + large**2)
    assert multiply_adds(query, kernel) == by_taps(height, width, groups, dims, small, large)
    assert multiply_adds((7, *query[1:]), (7, *kernel[1:])) == 7 * multiply_adds(query, kernel)


@pytest.mark.parametrize('backend', ['auto', 'eager', 'cpp', 'reference'])
def test_contmix_in_a_block_counts_the_same_with_every_backend(backend):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = DynamicBlock(16, 4, 7, num_groups=2, contmix_backend=backend)

        def forward(self, x):
            return self.block(x, x[:, :4], x[:, :4])[0]

    counted = count(Block(), torch.zeros(1, 16, 9, 8)).operators
    assert counted['contmix'] == by_taps(9, 8, 2, 4, 5, 7)
    assert counted['matmul'] == 49 * 8 * (25 + 49)  # the regions are projected to taps, once


@pytest.mark.parametrize('kernel_size', [7, 17])
def test_large_kernels_count_their_branches_until_they_are_merged(kernel_size):
    layer, x = DilatedReparamConv(4, kernel_size), torch.zeros(1, 4, 20, 30)
    taps = kernel_size**2 + sum(size**2 for size, _ in BRANCHES[kernel_size])
    assert count(layer, x).operators['conv'] == 4 * 600 * taps
    layer.switch_to_deploy()
    assert count(layer, x).operators == {'conv': 4 * 600 * kernel_size**2}


@pytest.mark.parametrize('form', ['training', 'merged', 'folded'])
def test_convolutions_and_products_are_those_that_torch_counts(form):
    model, x = OverLoCK(TINY, num_classes=10).to_form(form).eval(), torch.zeros(1, 3, 224, 224)
    counted = count(model, x)
    with FlopCounterMode(display=False) as torch_counter, torch.no_grad():
        model(x)
    # Two for each multiply-add; torch knows nothing of our operator.
    assert torch_counter.get_total_flops() == 2 * (counted.operators['conv'] + counted.operators['matmul'])
    assert counted.operators['contmix'] > 0
    assert (
        counted.multiply_adds['']
        == sum(counted.operators.values())
        == sum(value for part, value in counted.multiply_adds.items() if part)
    )
    assert counted.parameters[''] == sum(parameter.numel() for parameter in model.parameters())


def test_counting_leaves_the_model_as_it_was():
    model = OverLoCKBackbone(TINY).eval()
    before, x = copy.deepcopy(model), torch.rand(1, 3, 64, 64)
    assert count(model, x) == count(model, x)
    with torch.no_grad():
        assert all(torch.equal(out, expected) for out, expected in zip(model(x), before(x), strict=True))
    assert not any(module._forward_hooks for module in model.modules())


def test_detector_counts_as_many_boxes_as_it_keeps():
    counted = count_config(ROOT / 'configs/mask_rcnn_overlock_xt_1x.py', (128, 160), cfg_options=DETECTOR)
    box = 12544 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80)
    mask = 196 * (4 * 9 * 256 * 256 + 4 * 256 * 256) + 784 * 256 * 80
    assert counted.multiply_adds['roi_head'] == 60 * box + 7 * mask
    anchors = sum(128 // stride * (160 // stride) for stride in (4, 8, 16, 32)) + 2 * 3  # padded at stride 64
    assert counted.multiply_adds['rpn_head'] == anchors * 256 * (9 * 256 + 3 + 12)
    backbone = count(OverLoCKBackbone(TINY, deploy=True), torch.zeros(1, 3, 128, 160))
    assert counted.multiply_adds['backbone'] == backbone.multiply_adds['']
    assert counted.parameters['backbone'] == backbone.parameters['']
    assert 'rpn_head' in str(counted) and 'whole' in str(counted) and 'data_preprocessor' not in str(counted)
    unfolded = count_config(
        ROOT / 'configs/mask_rcnn_overlock_xt_1x.py', (128, 160), deploy=False, cfg_options=DETECTOR
    )
    assert unfolded.multiply_adds['backbone'] > backbone.multiply_adds['']
    assert unfolded.multiply_adds['roi_head'] == counted.multiply_adds['roi_head']


def test_cascade_counts_the_heads_of_all_its_stages():
    counted = count_config(ROOT / 'configs/cascade_overlock_xt_1x.py', (128, 160), cfg_options=DETECTOR)
    convs = 49 * (4 * 9 * 256 * 256 + 4 * 2 * 256)  # with their BatchNorms
    box = convs + 12544 * 1024 + 1024 * (81 + 4 * 80)
    mask = 196 * (4 * 9 * 256 * 256 + 4 * 256 * 256) + 784 * 256 * 80
    assert counted.multiply_adds['roi_head'] == 3 * (60 * box + 7 * mask)


def test_segmenter_counts_without_its_auxiliary_head():
    path = ROOT / 'configs/upernet_overlock_xt_160k.py'
    counted = count_config(path, (64, 96), cfg_options=SEGMENTER)
    backbone = OverLoCKBackbone(TINY, overview_residual=False, deploy=True)
    assert counted.multiply_adds['backbone'] == count(backbone, torch.zeros(1, 3, 64, 96)).multiply_adds['']
    assert counted.multiply_adds['decode_head'] > 16 * 24 * 9 * 4 * 512 * 512  # the bottleneck alone
    assert 'auxiliary_head' not in counted.parameters
    assert counted.size == (64, 96)


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ("default_scope = 'mmdet'", 'expected `model.backbone`, and `default_scope` to be one of mmdet, mmseg'),
        ("model = dict(backbone=dict(type='OverLoCK'))", 'got None'),
    ],
)
def test_a_configuration_without_a_model_is_told(tmp_path, text, sentence):
    (tmp_path / 'a.py').write_text(text)
    with pytest.raises(UserError, match=sentence):
        count_config(tmp_path / 'a.py')


def test_tool_prints_the_parts(run_tool):
    options = ['model.decode_head.channels=16', 'model.decode_head.num_classes=3']
    code, out, err = run_tool(
        'complexity', ROOT / 'configs/upernet_overlock_xt_160k.py', '--size', 64, 64, '--cfg-options', *options
    )
    assert code == 0, err
    assert out.startswith('image of 64x64\n') and 'backbone' in out and 'decode_head' in out
    code, out, err = run_tool('complexity', 'absent.py')
    assert (code, out) == (2, '') and err.startswith('The configuration absent.py does not exist; ')
