"""MogaNet's detectors and segmenters saved by mmdet 2.26 and mmseg 0.29: every name and shape is the same here."""

import gzip
import json

import pytest
import torch

from tests.configs import legacy
from tests.configs.testing import build_meta, default_scope, load_config
from tests.testing import DATA, published_weights

SHAPES = json.loads(gzip.decompress((DATA / 'state_dicts_moganet.json.gz').read_bytes()))
DIMS = {'xt': (32, 64, 96, 192), 's': (64, 128, 320, 512)}


def biased(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of layers with weight and bias."""
    return {
        f'{name}.{kind}': shape if kind == 'weight' else shape[:1]
        for name, shape in shapes.items()
        for kind in ('weight', 'bias')
    }


def normed(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of convolutions without bias and their BatchNorms."""
    all_shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        all_shapes[f'{name}.conv.weight'] = shape
        all_shapes |= {f'{name}.bn.{kind}': shape[:1] for kind in ('weight', 'bias', 'running_mean', 'running_var')}
        all_shapes[f'{name}.bn.num_batches_tracked'] = ()
    return all_shapes


def neck(dims, outputs: int) -> dict[str, tuple[int, ...]]:
    return biased(
        {
            **{f'neck.lateral_convs.{i}.conv': (256, channels, 1, 1) for i, channels in enumerate(dims)},
            **{f'neck.fpn_convs.{i}.conv': (256, 256, 3, 3) for i in range(len(dims))},
            # On the last map of the backbone, then on the one before.
            **{
                f'neck.fpn_convs.{i}.conv': (256, dims[-1] if i == len(dims) else 256, 3, 3)
                for i in range(len(dims), outputs)
            },
        }
    )


def mask_head(prefix: str) -> dict[str, tuple[int, ...]]:
    return {
        **{f'{prefix}.convs.{i}.conv': (256, 256, 3, 3) for i in range(4)},
        f'{prefix}.upsample': (256, 256, 2, 2),
        f'{prefix}.conv_logits': (80, 256, 1, 1),
    }


RPN = {'rpn_conv': (256, 256, 3, 3), 'rpn_cls': (3, 256, 1, 1), 'rpn_reg': (12, 256, 1, 1)}


def mask_rcnn(arch: str) -> dict[str, tuple[int, ...]]:
    heads = {
        **{f'rpn_head.{name}': shape for name, shape in RPN.items()},
        'roi_head.bbox_head.shared_fcs.0': (1024, 256 * 7 * 7),
        'roi_head.bbox_head.shared_fcs.1': (1024, 1024),
        'roi_head.bbox_head.fc_cls': (81, 1024),
        'roi_head.bbox_head.fc_reg': (4 * 80, 1024),
        **mask_head('roi_head.mask_head'),
    }
    return neck(DIMS[arch], 4) | biased(heads)


def cascade(arch: str) -> dict[str, tuple[int, ...]]:
    shapes = neck(DIMS[arch], 4) | biased({f'rpn_head.{name}': shape for name, shape in RPN.items()})
    for stage in range(3):
        head = f'roi_head.bbox_head.{stage}'
        shapes |= normed({f'{head}.shared_convs.{i}': (256, 256, 3, 3) for i in range(4)})
        shapes |= biased(
            {
                f'{head}.shared_fcs.0': (1024, 256 * 7 * 7),
                f'{head}.fc_cls': (81, 1024),
                f'{head}.fc_reg': (4 * 80, 1024),
                **mask_head(f'roi_head.mask_head.{stage}'),
            }
        )
    return shapes


def retinanet(arch: str) -> dict[str, tuple[int, ...]]:
    heads = {f'bbox_head.{kind}_convs.{i}.conv': (256, 256, 3, 3) for kind in ('cls', 'reg') for i in range(4)}
    heads |= {'bbox_head.retina_cls': (9 * 80, 256, 3, 3), 'bbox_head.retina_reg': (9 * 4, 256, 3, 3)}
    return neck(DIMS[arch][1:], 5) | biased(heads)


def upernet(arch: str) -> dict[str, tuple[int, ...]]:
    *inner, last = DIMS[arch]
    convs = {
        **{f'decode_head.psp_modules.{i}.1': (512, last, 1, 1) for i in range(4)},
        'decode_head.bottleneck': (512, last + 4 * 512, 3, 3),
        **{f'decode_head.lateral_convs.{i}': (512, channels, 1, 1) for i, channels in enumerate(inner)},
        **{f'decode_head.fpn_convs.{i}': (512, 512, 3, 3) for i in range(3)},
        'decode_head.fpn_bottleneck': (512, 4 * 512, 3, 3),
        'auxiliary_head.convs.0': (256, inner[2], 3, 3),
    }
    return normed(convs) | biased(
        {'decode_head.conv_seg': (150, 512, 1, 1), 'auxiliary_head.conv_seg': (150, 256, 1, 1)}
    )


def semantic_fpn(arch: str) -> dict[str, tuple[int, ...]]:
    # A convolution and an upsampling for each doubling of the stride, at least one convolution.
    places = {0: (0,), 1: (0,), 2: (0, 2), 3: (0, 2, 4)}
    convs = {
        f'decode_head.scale_heads.{level}.{place}': (128, 128 if place else 256, 3, 3)
        for level, inside in places.items()
        for place in inside
    }
    return neck(DIMS[arch], 4) | normed(convs) | biased({'decode_head.conv_seg': (150, 128, 1, 1)})


HEADS = {
    'mask_rcnn_moganet_xt_1x': mask_rcnn,
    'cascade_moganet_s_3x': cascade,
    'retinanet_moganet_xt_1x': retinanet,
    'upernet_moganet_xt_160k': upernet,
    'fpn_moganet_xt_80k': semantic_fpn,
}


def old_shapes(name: str) -> dict[str, tuple[int, ...]]:
    arch = name.split('_')[-2]
    backbone = {f'backbone.{k}': tuple(v) for k, v in SHAPES[arch].items() if not k.startswith('head.')}
    return backbone | HEADS[name](arch)


@pytest.mark.parametrize('name', HEADS)
def test_names_and_shapes_are_those_of_the_old_file(name):
    model = build_meta(load_config(name))
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == old_shapes(name)


@pytest.mark.parametrize(
    ('name', 'data', 'scale', 'version'),
    [
        ('retinanet_moganet_xt_1x', 'coco_root', (299, 180), dict(mmdet_version='2.26.0')),
        ('fpn_moganet_xt_80k', 'ade_root', (200, 135), dict(mmseg_version='0.29.1')),
    ],
)
def test_an_old_file_loads_and_predicts_through_the_tool(name, data, scale, version, tmp_path, request):
    shapes = old_shapes(name)
    own = {key.removeprefix('backbone.'): shape for key, shape in shapes.items() if key.startswith('backbone.')}
    backbone = {
        f'backbone.{key}': value.float() if value.is_floating_point() else value
        for key, value in published_weights(own).items()
    }
    weights = backbone | legacy.head_weights({k: s for k, s in shapes.items() if k not in backbone})
    file = legacy.save(tmp_path / 'old.pth', weights, epoch=12, **version)
    with default_scope(), torch.no_grad():
        loop = legacy.load(name, file, request.getfixturevalue(data), tmp_path, scale)
        model = loop.runner.model.eval()
        state = model.state_dict()
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key].cpu(), weights[key]) for key in weights)
        result = model.test_step(next(iter(loop.dataloader)))[0]
    assert 'pred_instances' in result or 'pred_sem_seg' in result
