"""timm: entry points for `timm.create_model`, and the classifier with timm's interface.

`python -m overlock.timm SCRIPT ARGS...` runs one of the scripts of timm's repository with these models registered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from overlock.checkpoint import WEIGHTS, Weights, find_file, from_published
from overlock.models.arch import ARCHS
from overlock.models.overlock import MIN_SIZE
from overlock.timm.model import CLASSIFIERS, FIRST_CONV, TimmOverLoCK

__all__ = ['TimmOverLoCK', 'checkpoint_filter_fn']


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename published entries of a state dict, for the sources that timm reads itself."""
    return from_published(state_dict)


def _pretrained_cfg(weights: Weights) -> dict[str, Any]:
    images = weights.preprocessing
    return {
        'url': weights.url,
        'num_classes': 1000,
        'input_size': (3, *images.size),
        'min_input_size': (3, MIN_SIZE, MIN_SIZE),
        'pool_size': tuple(side // 32 for side in images.size),
        'crop_pct': images.crop_pct,
        'interpolation': images.interpolation,
        'mean': images.mean,
        'std': images.std,
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
    weights = f'overlock_{arch}_in1k{"_reparam" if reparam else ""}'
    overlay = dict(pretrained_cfg_overlay or {})
    if kwargs.get('aux_head'):
        overlay.setdefault('classifier', CLASSIFIERS)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    source = cfg.file or cfg.url
    # Read files here: older versions of timm run what they hold, and all leave gaps where classes differ.
    if pretrained and isinstance(source, str) and source and not (cfg.state_dict or cfg.hf_hub_id or cfg.source):
        source = weights if source == WEIGHTS[weights].url else source
        overlay |= {'file': str(find_file(source)), 'custom_load': True}
    return build_model_with_cfg(
        TimmOverLoCK,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={'out_indices': (0, 1, 2, 3), 'feature_cls': 'getter'},
        **kwargs,
    )


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build OverLoCK-XT."""
    return _create('overlock_xt', pretrained, **kwargs)


@register_model
def overlock_xt_reparam(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build OverLoCK-XT, folded for inference."""
    return _create('overlock_xt_reparam', pretrained, **kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build OverLoCK-T."""
    return _create('overlock_t', pretrained, **kwargs)


@register_model
def overlock_t_reparam(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build OverLoCK-T, folded for inference."""
    return _create('overlock_t_reparam', pretrained, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build OverLoCK-S."""
    return _create('overlock_s', pretrained, **kwargs)


@register_model
def overlock_s_reparam(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build OverLoCK-S, folded for inference."""
    return _create('overlock_s_reparam', pretrained, **kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build OverLoCK-B."""
    return _create('overlock_b', pretrained, **kwargs)


@register_model
def overlock_b_reparam(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build OverLoCK-B, folded for inference."""
    return _create('overlock_b_reparam', pretrained, **kwargs)
