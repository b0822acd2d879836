"""Tuned models and compiled blocks compute the same, and those in bfloat16 nearly the same."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.detectors import confide, make_data
from mmengine_overlock import speed
from mmengine_overlock.config import load_config
from mmengine_overlock.deploy import build, compare, predict
from mmengine_overlock.speed import TuneHook, compile_backbones, narrow_backbones, tune_for_inference, tune_for_training
from overlock import MogaNetBackbone, OverLoCKBackbone
from overlock.models.names import form_of
from overlock.utils.errors import UserError
from tests.mmengine_overlock.test_deploy import CONFIGS, MOGANET
from tests.testing import randomise

TINY = dict(
    embed_dims=(8, 16, 32, 48), base_depths=(1, 1, 2), overview_depth=1, focus_depths=(3, 1), focus_groups=(2, 2)
)


# oneDNN has no fast bfloat16 kernels for depthwise convolutions of few channels: with 8 one takes minutes.
WIDER = {**TINY, 'embed_dims': (64, 64, 64, 64)}
WIDE_MOGANET = dict(embed_dims=(64, 64, 64, 64), depths=(1, 1, 1, 1), ffn_ratios=(2, 2, 2, 2))


class Detector(nn.Module):
    """A model with a backbone."""

    def __init__(self, backbone=None) -> None:
        super().__init__()
        self.backbone = backbone or OverLoCKBackbone(TINY, drop_path_rate=0.3)

    def forward(self, x):
        return self.backbone(x)


def image(height=256, width=224, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.fixture
def open_model(tmp_path):
    """Return the configuration of a text, its model with weights that find something, and a picture."""

    def open_model(text):
        path, picture = tmp_path / 'config.py', tmp_path / 'scene.png'
        path.write_text(text)
        pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC).save(picture)
        cfg = load_config(path)
        model = randomise(build(cfg, None))
        confide(model)
        return cfg, model, picture

    return open_model


@pytest.mark.parametrize(
    ('text', 'uses'),
    # A negative threshold asks for probabilities, from 0 to 255.
    [
        (CONFIGS['detector'].replace('max_per_img=20', 'max_per_img=20, mask_thr_binary=-1'), {'roi_align', 'conv3x3'}),
        (CONFIGS['segmenter'], {'conv3x3'}),
        (MOGANET, {'conv3x3'}),
    ],
    ids=['detector', 'segmenter', 'moganet'],
)
def test_tuned_model_predicts_the_same(open_model, monkeypatch, text, uses):
    used = set()

    def watched(name, inner):
        return lambda *args: used.add(name) or inner(*args)

    for name in ('roi_align', 'conv3x3'):
        monkeypatch.setattr(speed, name, watched(name, getattr(speed, name)))
    monkeypatch.setattr(speed, '_WINOGRAD_CHANNELS', 8)
    cfg, model, picture = open_model(text)
    truth = predict(model, cfg, picture)
    assert tune_for_inference(model) is model
    found = predict(model, cfg, picture)
    same, account = compare(found, truth)
    assert same and used == uses, account
    if 'pred_instances' in truth[1]:
        masks, exact = (sample.pred_instances.masks.int() for _, sample in (found, truth))
        assert len(exact) == 20 and exact.any() and (masks - exact).abs().max() <= 1
    else:
        logits = truth[1].seg_logits.data
        assert (found[1].seg_logits.data - logits).abs().max() <= 1e-4 * logits.abs().max()
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.decode_head.modules())


def test_model_tuned_for_training_learns_the_same(open_model, monkeypatch):
    cfg, model, _ = open_model(CONFIGS['detector'])
    data = model.train().data_preprocessor(make_data('mmdet', (128, 96), 2, True, cfg), training=True)
    other, used, inner = copy.deepcopy(model), [], speed.roi_align
    monkeypatch.setattr(speed, 'roi_align', lambda *args: used.append(args[0].shape) or inner(*args))
    tune_for_training(other)
    found, truth = (gradients(each, copy.deepcopy(data)) for each in (other, model))
    assert used and set(found) == set(truth)
    largest = max(gradient.abs().max().item() for gradient in truth.values())
    for name, gradient in truth.items():
        # Before a BatchNorm, shifts have gradients of rounding errors alone.
        limit = 1e-4 * max(gradient.abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=limit, msg=name)


def gradients(model, data):
    """Return the gradients of the sum of all losses, with the same draws each time."""
    torch.manual_seed(0)
    losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_model_tuned_to_bfloat16_predicts_nearly_the_same_in_float32(open_model):
    cfg, model, picture = open_model(
        CONFIGS['segmenter']
        .replace('(8, 16, 16, 32)', '(64, 64, 64, 64)')
        .replace('[8, 16, 24, 40]', '[64, 64, 80, 80]')
        .replace('in_channels=24', 'in_channels=80')
    )
    truth = predict(model, cfg, picture)
    tune_for_inference(model, torch.bfloat16)
    found = predict(model, cfg, picture)
    assert model.decode_head.conv_seg.weight.dtype == torch.bfloat16
    for ours, exact in zip([*found[0], found[1].seg_logits.data], [*truth[0], truth[1].seg_logits.data], strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - exact).abs().max() < 5e-2 * exact.abs().max()


def test_detector_tuned_to_bfloat16_gives_boxes_in_float32(open_model):
    wide = CONFIGS['detector'].replace('(8, 16, 16, 32)', '(64, 64, 64, 64)')
    cfg, model, picture = open_model(wide.replace('[8, 16, 24, 40]', '[64, 64, 80, 80]'))
    found = predict(tune_for_inference(model, torch.bfloat16), cfg, picture)[1].pred_instances
    assert found.bboxes.dtype == found.scores.dtype == torch.float32 and len(found) == 20


def test_tuned_copy_uses_its_own_weights(open_model):
    cfg, model, picture = open_model(MOGANET)
    tune_for_inference(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict(keep_vars=True).values():
            tensor.zero_()
    assert predict(other, cfg, picture)[1].seg_logits.data.abs().max() == 0
    assert predict(model, cfg, picture)[1].seg_logits.data.abs().max() > 0


class Foreign(nn.Module):
    """A model with a neck that the configurations here do not have."""

    def __init__(self, neck) -> None:
        super().__init__()
        self.backbone, self.neck = nn.Identity(), neck

    def forward(self, x):
        return self.neck(self.backbone(x))


class Shared(nn.Module):
    """One convolution with two BatchNorms, as in RTMDet's heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv_module() for _ in range(2))
        self.layers[1].conv = self.layers[0].conv

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


class Regions(nn.Module):
    """An operator of mmcv on regions, behind a convolution."""

    def __init__(self, name, *args, **options) -> None:
        super().__init__()
        import mmcv.ops

        self.conv, self.align = conv_module(), getattr(mmcv.ops, name)(7, 0.25, *args, **options)

    def forward(self, x):
        rois = torch.tensor([[0, 1, 2, 30, 40], [1, 8, 4, 60, 60.0]])
        if type(self.align).__name__ == 'RoIAlignRotated':
            rois = torch.cat([rois, torch.tensor([[0.3], [0.5]])], 1)
        return self.align(self.conv(x), rois.to(x.dtype))


def conv_module(kind='Conv2d', **options):
    from mmcv.cnn import ConvModule

    settings = dict(padding=1, conv_cfg=dict(type=kind), norm_cfg=dict(type='BN')) | options
    return ConvModule(8, 8, 3, **settings)


NECKS = {
    'batch norm': conv_module,
    'synchronized': lambda: conv_module(norm_cfg=dict(type='SyncBN')),
    'stride': lambda: conv_module(stride=2),
    'groups': lambda: conv_module(groups=4),
    'dilation': lambda: conv_module(dilation=2),
    'reflection': lambda: conv_module(padding_mode='reflect'),
    'norm first': lambda: conv_module(order=('norm', 'conv', 'act')),
    'no scale': lambda: conv_module(norm_cfg=dict(type='BN', affine=False)),
    'no statistics': lambda: conv_module(norm_cfg=dict(type='BN', track_running_stats=False)),
    'group norm': lambda: conv_module(norm_cfg=dict(type='GN', num_groups=2)),
    'spectral norm': lambda: conv_module(with_spectral_norm=True),
    'merged by mmcv': lambda: conv_module(efficient_conv_bn_eval=True),
    'standardized': lambda: conv_module('ConvWS'),
    'standardized and scaled': lambda: conv_module('ConvAWS'),
    'deformable': lambda: nn.Sequential(conv_module(), conv_module('DCN'), conv_module()),
    'modulated': lambda: nn.Sequential(conv_module(), conv_module('DCNv2'), conv_module()),
    'shared': Shared,
    'RoIAlign': lambda: Regions('RoIAlign'),
    'maxima': lambda: Regions('RoIAlign', 2, 'max'),
    'torchvision': lambda: Regions('RoIAlign', use_torchvision=True),
    'rotated': lambda: Regions('RoIAlignRotated', 2),
    'float64': lambda: nn.Conv2d(8, 8, 3, padding=1).double(),
}


@pytest.mark.parametrize('make', NECKS.values(), ids=NECKS)
def test_foreign_necks_compute_the_same(make, monkeypatch):
    pytest.importorskip('mmcv.ops')
    monkeypatch.setattr(speed, '_WINOGRAD_CHANNELS', 8)
    torch.manual_seed(0)
    model = randomise(Foreign(make())).eval()
    x = torch.randn(2, 8, 16, 20, dtype=next(model.parameters()).dtype)
    tuned = tune_for_inference(copy.deepcopy(model))
    with torch.no_grad():
        truth, found = model(x), tuned(x)
    assert (found - truth).abs().max() <= (1e-5 if x.dtype == torch.float32 else 1e-12) * truth.abs().max()


def test_weights_that_are_loaded_later_and_autocast_are_right(monkeypatch):
    monkeypatch.setattr(speed, '_WINOGRAD_CHANNELS', 8)
    torch.manual_seed(0)
    model = Foreign(nn.Conv2d(8, 8, 3, padding=1)).eval()
    tuned, other = tune_for_inference(copy.deepcopy(model)), Foreign(nn.Conv2d(8, 8, 3, padding=1)).eval()
    x = torch.randn(2, 8, 16, 20)
    tuned.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert (tuned(x) - other(x)).abs().max() <= 1e-5 * other(x).abs().max()
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(tuned(x), other(x))


def test_hook_tunes_the_model_behind_wrappers():
    wrapper = nn.Module()
    wrapper.module = Detector()
    TuneHook(amp=True).before_test(SimpleNamespace(model=wrapper))
    assert form_of(wrapper.module.backbone.state_dict()) == 'folded' and not wrapper.module.training
    assert wrapper.module.backbone.narrow_dtype == torch.bfloat16


def test_dtype_that_the_device_does_not_compute_in_is_refused():
    with pytest.raises(UserError, match=r'dtype must be torch.bfloat16, .* or None; got torch.float16 on cpu'):
        tune_for_inference(nn.Linear(1, 1), torch.float16)


@pytest.mark.parametrize('network', [OverLoCKBackbone, MogaNetBackbone])
def test_backbone_in_bfloat16_gives_float32_near_the_exact_maps(network):
    torch.manual_seed(0)
    model = Detector(network(WIDER if network is OverLoCKBackbone else WIDE_MOGANET)).eval()
    with torch.no_grad():
        expected = model(image(64, 96))
        narrow_backbones(model)
        actual = model(image(64, 96))
    for ours, truth in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        deviation = (ours - truth).abs().max() / truth.abs().max()
        assert 0 < deviation < 5e-2


def test_narrow_backbone_can_be_copied_and_the_copy_uses_its_own_weights():
    model = Detector(OverLoCKBackbone(WIDER)).eval()
    narrow_backbones(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert other(image(64, 64))[0].abs().max() == 0 < model(image(64, 64))[0].abs().max()


@pytest.mark.parametrize('function', [narrow_backbones, compile_backbones])
def test_model_without_the_backbone_is_refused(function):
    with pytest.raises(UserError, match='work on the backbones OverLoCK and MogaNet, and this model has none'):
        function(nn.Linear(1, 1))


@pytest.mark.slow
def test_compiled_blocks_train_the_same_in_few_graphs_for_every_size():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = Detector().train()
    names = list(model.state_dict())
    compiled = copy.deepcopy(model)
    compile_backbones(compiled, backend='aot_eager', fullgraph=True)
    for size in ((256, 224), (288, 352)):
        results = []
        for each in (model, compiled):
            torch.manual_seed(1)
            outs = each(image(*size))
            each.zero_grad()
            sum(out.square().mean() for out in outs).backward()
            results.append([*outs, *(parameter.grad for parameter in each.parameters())])
        largest = max(t.abs().max() for t in results[0])
        for ours, truth in zip(*results, strict=True):
            assert (ours - truth).abs().max() <= 1e-5 * largest
    assert list(compiled.state_dict()) == names
    # Four static stages; dynamic blocks without a prior, with one, and the last: not one for each block and size.
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 7


@pytest.mark.slow
def test_compiled_blocks_of_moganet_compute_the_same():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Detector(MogaNetBackbone(WIDE_MOGANET)).train()
    compiled = copy.deepcopy(model)
    compile_backbones(compiled, backend='aot_eager', fullgraph=True)
    for ours, truth in zip(compiled(image(64, 96)), model(image(64, 96)), strict=True):
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()
