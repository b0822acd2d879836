"""A trained model in its deploy form comes with its configuration, predicts the same, and is one that tools load."""

import copy
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from demo.detector import draw
from mmengine_overlock import deploy
from mmengine_overlock.config import load_config
from mmengine_overlock.deploy import compare, deployed_config, predict, reparameterize
from overlock.checkpoint import CheckpointError, to_published
from overlock.checkpoint.convert import write_weights
from overlock.models.names import form_of
from overlock.utils.errors import UserError
from tests.testing import randomise

ROOT = Path(__file__).resolve().parents[2]
BACKBONE = """backbone=dict(arch=dict(
    _delete_=True, embed_dims=(8, 16, 16, 32), base_depths=(1, 1, 1), overview_depth=1, focus_depths=(2, 1),
    focus_groups=(2, 4)))"""
CONFIGS = {
    'detector': f"""
_base_ = '{ROOT}/configs/mask_rcnn_overlock_xt_1x.py'
small = dict(type='Resize', scale=(160, 128), keep_ratio=True)
model = dict({BACKBONE}, neck=dict(in_channels=[8, 16, 24, 40], out_channels=16),
             rpn_head=dict(in_channels=16, feat_channels=16),
             roi_head=dict(bbox_roi_extractor=dict(out_channels=16), mask_roi_extractor=dict(out_channels=16),
                           bbox_head=dict(in_channels=16, fc_out_channels=16),
                           mask_head=dict(in_channels=16, conv_out_channels=16)),
             # Untrained heads give low scores.
             test_cfg=dict(rpn=dict(max_per_img=50), rcnn=dict(score_thr=0.0, max_per_img=20)))
test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'), small, dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
work_dir = 'of_training'
""",
    'segmenter': f"""
_base_ = '{ROOT}/configs/upernet_overlock_xt_160k.py'
model = dict({BACKBONE}, decode_head=dict(in_channels=[8, 16, 24, 40], channels=16),
             auxiliary_head=dict(in_channels=24, channels=16))
""",
}
MOGANET = f"""
_base_ = '{ROOT}/configs/fpn_moganet_xt_80k.py'
model = dict(backbone=dict(arch=dict(_delete_=True, embed_dims=(8, 16, 16, 32), depths=(1, 2, 1, 1))),
             neck=dict(in_channels=[8, 16, 16, 32], out_channels=16),
             decode_head=dict(in_channels=[16, 16, 16, 16], channels=16))
"""
CLASSES = {'classes': ('cat', 'dog'), 'palette': [(1, 2, 3), (4, 5, 6)]}


def build(config):
    cfg = load_config(config)
    cfg.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A configuration and a checkpoint each of a detector and a segmenter, with statistics other than the initial."""
    folder = tmp_path_factory.mktemp('trained')
    logging.disable(logging.INFO)
    for kind, text in CONFIGS.items():
        (folder / f'{kind}.py').write_text(text)
        torch.manual_seed(0)
        model = build(folder / f'{kind}.py')
        model.init_weights()
        for name, value in model.backbone.state_dict().items():
            if name.endswith(('bn.weight', 'running_var', 'beta', 'bias', 'running_mean')):
                value.copy_(torch.rand(value.shape) + 0.5)
        torch.save(
            {'state_dict': model.state_dict(), 'meta': {'dataset_meta': CLASSES, 'epoch': 3}, 'epoch': 3},
            folder / f'{kind}.pth',
        )
    logging.disable(logging.NOTSET)
    return folder


@pytest.fixture(params=CONFIGS)
def kind(request):
    return request.param


@pytest.mark.parametrize('norm_cfg', [{}, dict(eps=0.1), dict(type='SyncBN', eps=1e-2, requires_grad=False)], ids=str)
def test_moganet_is_folded_too_with_the_norms_of_its_configuration(norm_cfg, tmp_path):
    (tmp_path / 'config.py').write_text(MOGANET.replace('backbone=dict(', f'backbone=dict(norm_cfg={norm_cfg}, '))
    model = build(tmp_path / 'config.py')
    randomise(model.backbone)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'trained.pth')
    reparameterize(tmp_path / 'config.py', str(tmp_path / 'trained.pth'), tmp_path / 'out.pth')
    assert build(tmp_path / 'out.py').load_state_dict(torch.load(tmp_path / 'out.pth')['state_dict'], strict=True)


def test_new_pair_is_whole_and_predicts_the_same(kind, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = reparameterize(trained / f'{kind}.py', str(trained / f'{kind}.pth'), 'new/out.v1.pth')
    wrote, numbers = text.split('\n')
    assert wrote == 'wrote new/out.v1.pth and new/out.v1.py'
    assert numbers.startswith('on scene.png: outputs of the backbone within ')
    assert numbers.endswith(('of 20 and 20 boxes the same', '% of 65536 pixels of the same class'))
    assert sorted(path.name for path in (tmp_path / 'new').iterdir()) == ['out.v1.pth', 'out.v1.py']

    content = torch.load('new/out.v1.pth', weights_only=True)
    assert content['meta'] == {'dataset_meta': CLASSES}
    backbone = {name for name in content['state_dict'] if name.startswith('backbone.')}
    assert form_of(backbone) == 'folded'
    before = torch.load(trained / f'{kind}.pth', weights_only=True)['state_dict']
    for name in content['state_dict'].keys() - backbone:
        assert torch.equal(content['state_dict'][name], before[name])

    new, old = Config.fromfile('new/out.v1.py'), Config.fromfile(trained / f'{kind}.py')
    assert new.model.backbone.deploy is True and 'init_cfg' not in new.model.backbone
    assert 'work_dir' not in new and 'launcher' not in new
    old.pop('work_dir', None)
    old.model.backbone.pop('init_cfg')
    new.model.backbone.pop('deploy')
    assert new.to_dict() == old.to_dict()

    again = reparameterize('new/out.v1.py', 'new/out.v1.pth', 'again.pth')
    assert 'within 0.0e+00' in again
    assert (tmp_path / 'again.pth').read_bytes() == (tmp_path / 'new/out.v1.pth').read_bytes()
    assert (tmp_path / 'again.py').read_bytes() == (tmp_path / 'new/out.v1.py').read_bytes()


def test_new_pair_is_loaded_by_the_toolbox_and_the_numbers_are_the_ones_before(kind, trained, tmp_path):
    picture = tmp_path / 'picture.png'
    pixels = np.random.default_rng(1).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    text = reparameterize(trained / f'{kind}.py', str(trained / f'{kind}.pth'), tmp_path / 'out.pth', image=picture)
    assert 'on picture.png:' in text
    if kind == 'detector':
        from mmdet.apis import inference_detector as infer
        from mmdet.apis import init_detector as init
    else:
        from mmseg.apis import inference_model as infer
        from mmseg.apis import init_model as init
    first, second = (
        infer(init(str(folder / f'{name}.py'), str(folder / f'{name}.pth'), device='cpu'), str(picture))
        for folder, name in ((trained, kind), (tmp_path, 'out'))
    )
    if kind == 'segmenter':
        torch.testing.assert_close(second.seg_logits.data, first.seg_logits.data, rtol=0, atol=1e-4)
        return
    first, second = first.pred_instances, second.pred_instances
    assert len(first.scores) == 20
    torch.testing.assert_close(second.scores.sort().values, first.scores.sort().values, rtol=0, atol=1e-5)
    distances = (second.bboxes[:, None] - first.bboxes[None]).abs().amax(-1).amin(1)
    assert (distances < 0.01).sum() >= 19


def test_published_names_and_running_averages_are_taken(trained, tmp_path):
    checkpoint = torch.load(trained / 'segmenter.pth', weights_only=True)['state_dict']
    averaged = {
        name: value * 0.5 if name == 'decode_head.conv_seg.weight' else value
        for name, value in to_published(checkpoint, 'backbone.').items()
    }
    torch.save({'state_dict': checkpoint, 'state_dict_ema': averaged}, tmp_path / 'in.pth')
    reparameterize(trained / 'segmenter.py', str(tmp_path / 'in.pth'), tmp_path / 'out.pth', ema=True)
    written = torch.load(tmp_path / 'out.pth', weights_only=True)['state_dict']
    assert torch.equal(written['decode_head.conv_seg.weight'], checkpoint['decode_head.conv_seg.weight'] * 0.5)


def test_options_stay_in_the_new_configuration(trained, tmp_path):
    reparameterize(
        trained / 'detector.py',
        str(trained / 'detector.pth'),
        tmp_path / 'out.pth',
        cfg_options={'model.test_cfg.rcnn.max_per_img': 7, 'model.test_cfg.rcnn.score_thr': 0.9},
    )
    rcnn = Config.fromfile(tmp_path / 'out.py').model.test_cfg.rcnn
    assert (rcnn.max_per_img, rcnn.score_thr) == (7, 0.9)


@pytest.mark.parametrize(
    ('text', 'checkpoint', 'error', 'message'),
    [
        (
            CONFIGS['segmenter'].replace('channels=16)', 'channels=24)', 1),
            'segmenter.pth',
            CheckpointError,
            r'^.*segmenter.pth is not for this model: \d+ tensors of another shape \(first decode_head.*; give',
        ),
        (
            CONFIGS['segmenter'],
            'detector.pth',
            CheckpointError,
            r'detector.pth is not for this model: \d+ tensors missing from the file \(first decode_head.*\), \d+ '
            r'tensors that the model does not have \(first backbone.output_norms.overview',
        ),
        (
            CONFIGS['segmenter'].replace(BACKBONE, "backbone=dict(_delete_=True, type='MobileNetV2')"),
            'segmenter.pth',
            UserError,
            'has the backbone MobileNetV2, expected OverLoCK or MogaNet, which alone can be folded; give',
        ),
        (
            "model = dict(type='EncoderDecoder')",
            'segmenter.pth',
            UserError,
            'must be the configuration of a detector or segmenter: expected `model.backbone` and `test_dataloader`',
        ),
    ],
)
def test_a_wrong_configuration_is_one_clear_sentence(text, checkpoint, error, message, trained, tmp_path):
    (tmp_path / 'wrong.py').write_text(text)
    with pytest.raises(error, match=message) as caught:
        reparameterize(tmp_path / 'wrong.py', str(trained / checkpoint), tmp_path / 'out.pth')
    assert '\n' not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ['wrong.py']


def test_an_image_that_cannot_be_read_is_one_clear_sentence(trained, tmp_path):
    config, checkpoint = trained / 'segmenter.py', trained / 'segmenter.pth'
    with pytest.raises(UserError, match='^the image .*segmenter.py cannot be read .*; give the path of an image file$'):
        reparameterize(config, str(checkpoint), tmp_path / 'out.pth', image=config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('factor', [1.001, float('nan')])
def test_a_form_that_predicts_something_else_is_not_written(factor, kind, trained, tmp_path, monkeypatch):
    def write_wrongly(path, tensors, meta):
        tensors['backbone.output_norms.out0.weight'] *= factor
        write_weights(path, tensors, meta)

    (tmp_path / 'out.pth').write_text('old weights')
    (tmp_path / 'out.py').write_text('# old configuration')
    monkeypatch.setattr(deploy, 'write_weights', write_wrongly)
    nan = factor != factor
    said = 'cannot be weights' if nan else 'was not written: on scene.png the deploy form predicts something else'
    with pytest.raises(UserError, match=said):
        reparameterize(trained / f'{kind}.py', str(trained / f'{kind}.pth'), tmp_path / 'out.pth')
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        'out.pth': 'old weights',
        'out.py': '# old configuration',
    }


def test_boxes_are_compared_in_any_order_and_lost_ones_are_told(trained, tmp_path):
    cfg = load_config(trained / 'detector.py')
    picture = deploy._draw(tmp_path / 'scene.png')
    expected = predict(build(trained / 'detector.py').eval(), cfg, picture)
    maps, other = copy.deepcopy(expected)
    instances = other.pred_instances
    other.pred_instances = instances[torch.arange(len(instances) - 1, -1, -1)]
    other.pred_instances.bboxes[0] += 0.25
    same, account = compare((maps, other), expected)
    assert same and account.endswith('20 of 20 and 20 boxes the same')
    other.pred_instances.labels[3] += 1
    same, account = compare((maps, other), expected)
    assert not same and account.endswith('19 of 20 and 20 boxes the same')
    other.pred_instances = instances[:0]
    assert compare((maps, other), expected)[0] is False
    assert compare((maps, other), (maps, other))[0] is True


def test_configuration_given_is_not_changed(trained):
    cfg = load_config(trained / 'segmenter.py')
    before = copy.deepcopy(cfg.to_dict())
    assert deployed_config(cfg).model.backbone.deploy is True
    assert cfg.to_dict() == before


@pytest.mark.slow
def test_new_pair_is_tested_by_the_tool_from_any_folder(trained, tmp_path):
    data = draw(tmp_path / 'data', train=5, val=5, size=128)
    # Five shapes instead of COCO's eighty classes; scores do not matter here.
    classes = "metainfo=dict(classes=('circle', 'square', 'triangle', 'star', 'ring'))"
    text = CONFIGS['detector'].replace('dataset=dict(', f'dataset=dict({classes}, ')
    for head in ('conv_out_channels=16', 'fc_out_channels=16'):
        text = text.replace(head, f'{head}, num_classes=5')
    (tmp_path / 'five.py').write_text(text)
    torch.save({'state_dict': build(tmp_path / 'five.py').state_dict()}, tmp_path / 'five.pth')
    for command in (
        ('reparameterize', tmp_path / 'five.py', tmp_path / 'five.pth', tmp_path / 'new/out.pth'),
        ('test', 'new/out.py', 'new/out.pth', '--data-root', data / 'coco'),
    ):
        result = subprocess.run(
            [sys.executable, str(ROOT / 'tools' / f'{command[0]}.py'), *map(str, command[1:])],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    assert re.search('^  bbox +mAP ', result.stdout, re.MULTILINE)
