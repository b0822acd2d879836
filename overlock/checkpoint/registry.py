"""The published weights, in one table: configurations, timm, README and model index take names and URLs from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
MOGANET_RELEASES = 'https://github.com/Westlake-AI/MogaNet/releases/download/'


@dataclass(frozen=True)
class Weights:
    """One published file.

    Attributes:
        arch: The variant: 'xt', 't', 's', 'b', and for MogaNet 'l' and 'xl'.
        task: 'classification', 'detection' or 'segmentation'.
        metrics: Results that the authors report, in percent.
        form: 'training', or 'merged' for re-parameterized large kernels (see `overlock.models.forms`).
        crop_pct: Side of the center crop over the short side of the resized image; None but for classifiers.
        config: The configuration that evaluates it, by its name in configs/; None for classifiers.
        network: 'OverLoCK' or 'MogaNet'.
        size: Side of the images in pixels, for classifiers.
    """

    url: str
    arch: str
    task: str
    metrics: Mapping[str, float]
    form: str = 'training'
    crop_pct: float | None = None
    config: str | None = None
    sha256: str | None = None
    network: str = 'OverLoCK'
    size: int = 224


# Top-1 accuracy and the crop that it was measured with.
_CLASSIFIERS = {'xt': (82.7, 0.925), 't': (84.2, 0.95), 's': (84.8, 0.95), 'b': (85.1, 0.975)}
_FULL_NAMES = {'t': 'tiny', 's': 'small', 'b': 'base'}
_MASK_RCNN = {
    't': {'1x': (48.3, 43.3), '3x': (49.6, 43.9)},
    's': {'1x': (49.4, 44.0), '3x': (51.0, 45.0)},
    'b': {'1x': (49.9, 44.4), '3x': (51.4, 45.3)},
}
_UPERNET = {'t': 50.3, 's': 51.3, 'b': 51.7}

_MOGANET_FULL_NAMES = {'xt': 'xtiny', 't': 'tiny', 's': 'small', 'b': 'base', 'l': 'large', 'xl': 'xlarge'}
# By variant and image size: top-1, and the images of a step on each of 8 GPUs, as file names have them.
_MOGANET_IN1K = {
    ('xt', 224): (76.5, 128),
    ('xt', 256): (77.2, 128),
    ('t', 224): (79.0, 128),
    ('t', 256): (79.6, 128),
    ('s', 224): (83.4, 128),
    ('b', 224): (84.3, 128),
    ('l', 224): (84.7, 64),
    ('xl', 224): (85.1, 64),
}
# By configuration: results, and the file, whose names have no rule. Cascade L has no file, and UperNet XL neither file
# nor results. The file of Cascade S with simpler heads is left out: no configuration here has them.
_MOGANET_COCO = {
    **{
        f'mask_rcnn_moganet_{arch}_1x': (aps, f'mask_rcnn_moganet_{_MOGANET_FULL_NAMES[arch]}_fpn_1x_coco')
        for arch, aps in {
            'xt': (40.7, 37.6),
            't': (42.6, 39.1),
            's': (46.6, 42.2),
            'b': (49.0, 43.8),
            'l': (49.4, 44.2),
        }.items()
    },
    **{
        f'mask_rcnn_moganet_{arch}_3x': (aps, f'mask_rcnn_moganet_{arch}_fpn_mstrain_480-800_3x_coco')
        for arch, aps in {'t': (45.3, 40.7), 's': (48.5, 43.1), 'b': (50.3, 44.4), 'l': (50.6, 44.6)}.items()
    },
    **{
        f'cascade_moganet_{arch}_3x': (aps, f'cascade_mask_rcnn_moganet_{arch}_fpn_giou_4conv1f_ms_3x_coco')
        for arch, aps in {'s': (51.7, 45.1), 'b': (52.6, 46.0)}.items()
    },
    **{
        f'retinanet_moganet_{arch}_1x': ((ap,), f'retinanet_moganet_{_MOGANET_FULL_NAMES[arch]}_fpn_1x_coco')
        for arch, ap in {'xt': 39.7, 't': 41.4, 's': 45.8, 'b': 47.7, 'l': 48.7}.items()
    },
}
_MOGANET_UPERNET = {'xt': 42.2, 't': 43.7, 's': 49.2, 'b': 50.1, 'l': 50.9}
_MOGANET_FPN = {'xt': 40.3, 't': 43.1, 's': 47.7, 'b': 49.3, 'l': 50.2}

WEIGHTS: dict[str, Weights] = {
    **{
        f'overlock_{arch}_in1k{suffix}': Weights(
            f'{RELEASE}overlock_{arch}_in1k_224{suffix}.pth', arch, 'classification', {'top1': top1}, form, crop_pct
        )
        for suffix, form in (('', 'training'), ('_reparam', 'merged'))
        for arch, (top1, crop_pct) in _CLASSIFIERS.items()
    },
    **{
        f'mask_rcnn_overlock_{arch}_{schedule}_coco': Weights(
            f'{RELEASE}maskrcnn{schedule}_overlock_{_FULL_NAMES[arch]}_coco.pth',
            arch,
            'detection',
            {'box_ap': box, 'mask_ap': mask},
            config=f'mask_rcnn_overlock_{arch}_{schedule}',
        )
        for arch, results in _MASK_RCNN.items()
        for schedule, (box, mask) in results.items()
    },
    **{
        f'upernet_overlock_{arch}_ade20k': Weights(
            f'{RELEASE}upernet_overlock_{_FULL_NAMES[arch]}_ade20k.pth',
            arch,
            'segmentation',
            {'miou': miou},
            config=f'upernet_overlock_{arch}_160k',
        )
        for arch, miou in _UPERNET.items()
    },
    **{
        f'moganet_{arch}{"" if size == 224 else f"_{size}"}_in1k': Weights(
            f'{MOGANET_RELEASES}moganet-in1k-weights/moganet_{_MOGANET_FULL_NAMES[arch]}_sz{size}_8xbs{batch}_ep300.pth.tar',
            arch,
            'classification',
            {'top1': top1},
            crop_pct=0.9,
            network='MogaNet',
            size=size,
        )
        for (arch, size), (top1, batch) in _MOGANET_IN1K.items()
    },
    **{
        f'{config}_coco': Weights(
            f'{MOGANET_RELEASES}moganet-det-weights/{file}.pth',
            config.split('_')[-2],
            'detection',
            dict(zip(('box_ap', 'mask_ap'), aps, strict=False)),
            config=config,
            network='MogaNet',
        )
        for config, (aps, file) in _MOGANET_COCO.items()
    },
    **{
        f'{head}_moganet_{arch}_ade20k': Weights(
            f'{MOGANET_RELEASES}moganet-seg-weights/{head}_moganet_{_MOGANET_FULL_NAMES[arch]}_{schedule}_ade20k.pth',
            arch,
            'segmentation',
            {'miou': miou},
            config=f'{head}_moganet_{arch}_{schedule.rpartition("_")[2]}',
            network='MogaNet',
        )
        for head, schedule, results in (('upernet', '512x512_160k', _MOGANET_UPERNET), ('fpn', '80k', _MOGANET_FPN))
        for arch, miou in results.items()
    },
}

# Files that have the names and shapes of a network here, but were trained with another: by file name, the reason.
REFUSED = {
    'moga_tiny_deit3_sz256_lr2e_3_8xb128_fp16_ep300.pth': (
        'OpenMixup trained it with SiLU applied twice to gate and value (its `attn_force_fp32`), so that every tensor '
        'would fit MogaNet-T and the predictions would be wrong; take moganet_t_256_in1k'
    )
}
