"""The published weights, in one table: configurations, timm, README and model index take names and URLs from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RELEASE = 'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'


@dataclass(frozen=True)
class Weights:
    """One published file.

    Attributes:
        arch: The variant: 'xt', 't', 's' or 'b'.
        task: 'classification', 'detection' or 'segmentation'.
        metrics: Paper-reported results, in percent.
        form: 'training', or 'merged' for re-parameterized large kernels (see `overlock.models.forms`).
        crop_pct: Side of the center crop over the short side of the resized image; None but for classifiers.
        config: The configuration that evaluates it, by its name in configs/; None for classifiers.
    """

    url: str
    arch: str
    task: str
    metrics: Mapping[str, float]
    form: str = 'training'
    crop_pct: float | None = None
    config: str | None = None
    sha256: str | None = None


# Top-1 accuracy and the crop that it was measured with.
_CLASSIFIERS = {'xt': (82.7, 0.925), 't': (84.2, 0.95), 's': (84.8, 0.95), 'b': (85.1, 0.975)}
_FULL_NAMES = {'t': 'tiny', 's': 'small', 'b': 'base'}
_MASK_RCNN = {
    't': {'1x': (48.3, 43.3), '3x': (49.6, 43.9)},
    's': {'1x': (49.4, 44.0), '3x': (51.0, 45.0)},
    'b': {'1x': (49.9, 44.4), '3x': (51.4, 45.3)},
}
_UPERNET = {'t': 50.3, 's': 51.3, 'b': 51.7}

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
}
