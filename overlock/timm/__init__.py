"""timm: entry points for `timm.create_model`, and the classifier with timm's interface.

Importing it makes timm read weight files without running code from them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import _helpers, build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from overlock.checkpoint import WEIGHTS, Weights, find_file, load
from overlock.models.network import MIN_SIZE
from overlock.timm.interface import TimmModel
from overlock.timm.model import TimmOverLoCK
from overlock.timm.moganet import TimmMogaNet
from overlock.utils.errors import UserError

__all__ = ['TimmMogaNet', 'TimmOverLoCK']

_PAPERS = {'OverLoCK': 'arXiv:2502.20087', 'MogaNet': 'arXiv:2211.03295'}
_ORIGINS = {'OverLoCK': 'https://github.com/LMMMEng/OverLoCK', 'MogaNet': 'https://github.com/Westlake-AI/MogaNet'}


def _class_of(name: str) -> type[TimmOverLoCK | TimmMogaNet]:
    return TimmMogaNet if name.startswith('moganet') else TimmOverLoCK


def _pretrained_cfg(weights: Weights, model: type[TimmModel]) -> dict[str, Any]:
    return {
        'url': weights.url,
        'num_classes': 1000,
        'input_size': (3, weights.size, weights.size),
        'min_input_size': (3, MIN_SIZE, MIN_SIZE),
        'pool_size': (weights.size // 32, weights.size // 32),
        'crop_pct': weights.crop_pct,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': model.first_conv,
        'classifier': model.classifiers[0],
        'paper_ids': _PAPERS[weights.network],
        'origin_url': _ORIGINS[weights.network],
    }


# The names of weights, with those of timm: `moganet_t_256_in1k` is `moganet_t.in1k_256`.
default_cfgs = generate_default_cfgs(
    {
        f'{name.replace("_in1k", "").removesuffix("_256")}.in1k{"_256" * (weights.size == 256)}': _pretrained_cfg(
            weights, _class_of(name)
        )
        for name, weights in WEIGHTS.items()
        if weights.task == 'classification'
    }
)


def _create(
    name: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    if (feature_cls := kwargs.get('feature_cls', 'getter')) != 'getter':
        raise UserError(
            f"feature_cls must be 'getter', which knows all maps of {name}, got {feature_cls!r}; leave it out"
        )
    model, (_, arch, *reparam) = _class_of(name), name.split('_')
    kwargs = {'arch': arch, 'deploy': bool(reparam), **kwargs}
    overlay = dict(pretrained_cfg_overlay or {})
    if kwargs.get('aux_head'):
        overlay.setdefault('classifier', model.classifiers)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    source = cfg.file or cfg.url
    # Read files here: older versions of timm run what they hold, and all leave gaps where classes differ.
    if pretrained and isinstance(source, str) and source and not (cfg.state_dict or cfg.hf_hub_id or cfg.source):
        overlay |= {'file': str(find_file(source)), 'custom_load': True}
    return build_model_with_cfg(
        model,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=lambda state_dict, model: model.to_own_names(state_dict),
        feature_cfg={'out_indices': (0, 1, 2, 3), 'feature_cls': 'getter'},
        **kwargs,
    )


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'Build {name}, a `{_class_of(name).__name__}`; names with `_reparam` are folded for inference.'
    return create


globals().update({name: register_model(_entry_point(name)) for name in default_cfgs})


def _load_state_dict(checkpoint_path: str, use_ema: bool = True, *_: Any, **__: Any) -> dict[str, Tensor]:
    """Read a weight file in place of timm, some versions of which run its code and none of which check its bytes."""
    return load(checkpoint_path, None if use_ema else False)


_helpers.load_state_dict = _load_state_dict
