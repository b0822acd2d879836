"""Segmenters saved by mmseg 0.30, evaluated here: every step after the backbone against the rules of mmseg 0.30.

The rules are written out as functions of the old state dict; `docs/legacy_checkpoints.md` lists them.
"""

import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor
from torch.nn import functional as F

from overlock.checkpoint import CheckpointError
from tests.configs import legacy
from tests.configs.legacy import conv
from tests.configs.testing import CHANNELS, default_scope, load_config
from tests.testing import TOLERANCES, assert_relative

POOL_SCALES = (1, 2, 3, 6)
# 300 x 401 becomes 135 x 180, then 160 x 192.
SCALE = (200, 135)
FLOAT32 = TOLERANCES[torch.float32]


def old_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of UperNet's heads in mmseg 0.30."""
    *inner, last = CHANNELS[arch]
    normed = {
        **{f'decode_head.psp_modules.{i}.1': (512, last, 1, 1) for i in range(4)},
        'decode_head.bottleneck': (512, last + 4 * 512, 3, 3),
        **{f'decode_head.lateral_convs.{i}': (512, channels, 1, 1) for i, channels in enumerate(inner)},
        **{f'decode_head.fpn_convs.{i}': (512, 512, 3, 3) for i in range(3)},
        'decode_head.fpn_bottleneck': (512, 4 * 512, 3, 3),
        'auxiliary_head.convs.0': (256, inner[2], 3, 3),
    }
    shapes = {
        f'{head}.conv_seg.{kind}': shape
        for head, width in (('decode_head', 512), ('auxiliary_head', 256))
        for kind, shape in (('weight', (150, width, 1, 1)), ('bias', (150,)))
    }
    for name, shape in normed.items():
        shapes[f'{name}.conv.weight'] = shape
        shapes |= {f'{name}.bn.{kind}': shape[:1] for kind in ('weight', 'bias', 'running_mean', 'running_var')}
        shapes[f'{name}.bn.num_batches_tracked'] = ()
    return shapes


def old_weights(arch: str) -> dict[str, Tensor]:
    return legacy.backbone_weights('seg', arch) | legacy.head_weights(old_shapes(arch))


def old_input(path, scale) -> Tensor:
    """Apply the test pipeline of mmseg 0.30, bilinear to the scale and bicubic to multiples of 32; (1, 3, H, W)."""
    image = legacy.rescaled(cv2.imread(str(path)), scale)
    height, width = (-(-side // 32) * 32 for side in image.shape[:2])
    return legacy.normalized(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC))


def resize(x: Tensor, size) -> Tensor:
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)


def conv_module(weights, name, x, padding=0) -> Tensor:
    """Apply a convolution, BatchNorm by its running statistics, and ReLU."""
    norm = [weights[f'{name}.bn.{kind}'] for kind in ('running_mean', 'running_var', 'weight', 'bias')]
    return F.relu(F.batch_norm(conv(weights, f'{name}.conv', x, padding), *norm, eps=1e-5))


def old_decode_head(weights, maps) -> Tensor:
    """Apply UperNet: pyramid pooling of the last map, a top-down path, all levels joined at the finest."""

    def module(name, x, padding=0):
        return conv_module(weights, f'decode_head.{name}', x, padding)

    last = maps[3]
    pooled = [
        resize(module(f'psp_modules.{i}.1', F.adaptive_avg_pool2d(last, size)), last.shape[2:])
        for i, size in enumerate(POOL_SCALES)
    ]
    levels = [module(f'lateral_convs.{i}', maps[i]) for i in range(3)]
    levels.append(module('bottleneck', torch.cat([last, *pooled], 1), 1))
    for i in (3, 2, 1):
        levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:])
    levels = [*(module(f'fpn_convs.{i}', levels[i], 1) for i in range(3)), levels[3]]
    joined = torch.cat([resize(x, levels[0].shape[2:]) for x in levels], 1)
    return conv(weights, 'decode_head.conv_seg', module('fpn_bottleneck', joined, 1))


def old_auxiliary_head(weights, maps) -> Tensor:
    return conv(weights, 'auxiliary_head.conv_seg', conv_module(weights, 'auxiliary_head.convs.0', maps[2], 1))


def old_segmentation(logits, input_shape, ori_shape) -> tuple[Tensor, Tensor]:
    """Return logits (150, H, W), resized to the input's and then the original size, and the most probable classes."""
    logits = resize(resize(logits, input_shape), ori_shape)
    return logits[0], logits.softmax(1).argmax(1)[0]


def old_mean_iou(predicted, labels) -> float:
    """Return the mean IoU in percent; label 0 is ignored, label n is class n - 1."""
    labels = np.where(labels == 0, 255, labels.astype(int) - 1)
    predicted, labels = predicted[labels != 255], labels[labels != 255]
    counts = [np.bincount(x, minlength=150)[:150] for x in (predicted[predicted == labels], predicted, labels)]
    with np.errstate(invalid='ignore'):
        return np.nanmean(counts[0] / (counts[1] + counts[2] - counts[0])) * 100


@pytest.fixture(scope='module', params=['xt', pytest.param('t', marks=pytest.mark.slow)])
def old(request, ade_root, tmp_path_factory):
    """Return an old file, the model built from it, and the backbone's maps of the image; gradients are off."""
    folder, weights = tmp_path_factory.mktemp('old'), old_weights(request.param)
    name, image = f'upernet_overlock_{request.param}_160k', ade_root / 'images/validation/scene.jpg'
    file = legacy.save(
        folder / 'upernet.pth',
        weights,
        mmseg_version='0.30.0',
        iter=160000,
        CLASSES=('wall', 'building'),
        PALETTE=[[120, 120, 120], [180, 120, 120]],
    )
    with default_scope(), torch.no_grad():
        loop = legacy.load(name, file, ade_root, folder, SCALE)
        model = loop.runner.model.eval()
        maps = model.backbone(old_input(image, SCALE))
        yield SimpleNamespace(name=name, weights=weights, loop=loop, model=model, image=image, maps=maps)


def test_the_model_has_every_tensor_of_the_file(old):
    legacy.assert_holds(old.model, old.weights)


def test_a_file_without_the_auxiliary_head_is_refused(old, tmp_path):
    weights = {name: value for name, value in old.weights.items() if not name.startswith('auxiliary_head')}
    file = legacy.save(tmp_path / 'cut.pth', weights, mmseg_version='0.30.0')
    with pytest.raises(CheckpointError, match=r'7 tensors missing .*auxiliary_head'):
        old.loop.runner.load_checkpoint(str(file))


@pytest.mark.parametrize('scale', [SCALE, (2048, 512)])
def test_images_are_prepared_as_before(old, scale, ade_root):
    dataset = load_config(old.name).test_dataloader.dataset
    dataset.data_root = str(ade_root)
    dataset.pipeline[1].scale = scale
    batch = old.model.data_preprocessor(pseudo_collate([DATASETS.build(dataset)[0]]))
    expected, sample = old_input(old.image, scale), batch['data_samples'][0]
    assert batch['inputs'].shape == expected.shape
    assert_relative(batch['inputs'], expected, FLOAT32)
    # Nothing was padded, so nothing has to be cut off again.
    assert sample.img_shape == sample.pad_shape == tuple(expected.shape[2:])
    assert 'padding_size' not in sample.metainfo and 'img_padding_size' not in sample.metainfo


def test_the_decode_head_gives_the_same_logits(old):
    actual = old.model.decode_head(old.maps)
    assert actual.shape == (1, 150, 40, 48)
    assert_relative(actual, old_decode_head(old.weights, old.maps), FLOAT32)


def test_the_auxiliary_head_gives_the_same_logits(old):
    actual = old.model.auxiliary_head(old.maps)
    assert actual.shape == (1, 150, 10, 12)
    assert_relative(actual, old_auxiliary_head(old.weights, old.maps), FLOAT32)


def test_images_get_the_same_classes(old):
    actual = old.model.test_step(next(iter(old.loop.dataloader)))[0]
    logits, classes = old_segmentation(old_decode_head(old.weights, old.maps), (160, 192), (300, 401))
    # Ten times the tolerance of a single step: the image's last bits go through the whole network.
    assert_relative(actual.seg_logits.data, logits, 10 * FLOAT32)
    first, second = logits.topk(2, 0).values
    clear = first - second > 1e-3
    assert len(classes.unique()) > 5 and clear.float().mean() > 0.99
    assert torch.equal(actual.pred_sem_seg.data[0][clear], classes[clear])


def test_the_truth_is_read_and_scored_as_before(old, ade_root):
    sample = old.loop.dataloader.dataset[0]['data_samples']
    labels = cv2.imread(str(ade_root / 'annotations/validation/scene.png'), cv2.IMREAD_UNCHANGED)
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    assert np.array_equal(sample.gt_sem_seg.data[0].numpy(), np.where(labels == 0, 255, labels - 1.0))
    predicted = np.random.default_rng(0).integers(0, 5, labels.shape)
    sample.set_field(type(sample.gt_sem_seg)(data=torch.from_numpy(predicted)[None]), 'pred_sem_seg')
    old.loop.evaluator.process([sample])
    scores = old.loop.evaluator.evaluate(1)
    assert scores['mIoU'] == pytest.approx(old_mean_iou(predicted, labels), abs=0.005)


def test_classes_and_colors_keep_their_order():
    from mmseg.datasets import ADE20KDataset

    classes, palette = (ADE20KDataset.METAINFO[key] for key in ('classes', 'palette'))
    # The checksums of mmseg 0.30's `ADE20KDataset.CLASSES` and `PALETTE`.
    assert (len(classes), zlib.crc32('\n'.join(classes).encode())) == (150, 1836027960)
    assert zlib.crc32(bytes(value for color in palette for value in color)) == 3620555175


@pytest.mark.slow
def test_the_tool_evaluates_an_old_file(tmp_path, ade_root):
    file = legacy.save(tmp_path / 'upernet.pth', old_weights('t'), mmseg_version='0.30.0')
    photographs = legacy.PHOTOGRAPHS / 'ade_tiny'
    root = photographs.resolve() if photographs.is_dir() else ade_root
    printed = legacy.evaluate('upernet_overlock_t_160k', file, root, tmp_path, SCALE)
    assert ' mIoU: ' in printed
    assert f'Load checkpoint from {file}' in printed and 'do not match' not in printed
