"""timm: entry points for `timm.create_model`, and the classifier with timm's interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from overlock.checkpoint import WEIGHTS, Weights, find_file, from_published
from overlock.models.arch import ARCHS
from overlock.models.network import MIN_SIZE
from overlock.timm.model import CLASSIFIERS, FIRST_CONV, TimmOverLoCK

__all__ = ['TimmOverLoCK']


def _pretrained_cfg(weights: Weights) -> dict[str, Any]:
    return {
        'url': weights.url,
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'min_input_size': (3, MIN_SIZE, MIN_SIZE),
        'pool_size': (7, 7),
        'crop_pct': weights.crop_pct,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': FIRST_CONV,
        'classifier': CLASSIFIERS[0],
        'paper_ids': 'arXiv:2502.20087',
        'origin_url': 'https://github.com/LMMMEng/OverLoCK',
    }


default_cfgs = generate_default_cfgs(
    {
        f'overlock_{arch}{suffix}.in1k': _pretrained_cfg(WEIGHTS[f'overlock_{arch}_in1k{suffix}'])
        for arch in ARCHS
        for suffix in ('', '_reparam')
    }
)


def _create(
    name: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    arch, _, reparam = name.removeprefix('overlock_').partition('_')
    kwargs = {'arch': arch, 'deploy': bool(reparam), **kwargs}
    overlay = dict(pretrained_cfg_overlay or {})
    if kwargs.get('aux_head'):
        overlay.setdefault('classifier', CLASSIFIERS)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    source = cfg.file or cfg.url
    # Read files here: older versions of timm run what they hold, and all leave gaps where classes differ.
    if pretrained and isinstance(source, str) and source and not (cfg.state_dict or cfg.hf_hub_id or cfg.source):
        overlay |= {'file': str(find_file(source)), 'custom_load': True}
    return build_model_with_cfg(
        TimmOverLoCK,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=lambda state_dict, model: from_published(state_dict),
        feature_cfg={'out_indices': (0, 1, 2, 3), 'feature_cls': 'getter'},
        **kwargs,
    )


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'Build {name}, of `TimmOverLoCK`; the names with `_reparam` are folded for inference.'
    return create


globals().update({name: register_model(_entry_point(name)) for name in default_cfgs})
