"""timm: the classifier with timm's interface, and entry points for `timm.create_model`.

`python -m overlock.timm SCRIPT ARGS...` runs one of the scripts of timm's repository with these models registered.
"""

from __future__ import annotations

import logging
import runpy
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import create_classifier
from timm.models import (
    adapt_input_conv,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F

from overlock.checkpoint import WEIGHTS, Weights, find_file, from_published, load, load_state_dict
from overlock.layers import GRN, ChannelAffine
from overlock.models.arch import ARCHS, Arch
from overlock.models.overlock import MIN_SIZE, BaseNet, FocusNet, OverLoCK, OverviewNet
from overlock.utils.distributed import exit_on_user_error
from overlock.utils.errors import UserError

__all__ = ['TimmOverLoCK', 'checkpoint_filter_fn']

_logger = logging.getLogger(__name__)

_FIRST_CONV = 'base_net.stem.0.conv'
_CLASSIFIERS = ('head.fc', 'aux_head.fc')
_FEATURES = ('base_net.stage1', 'base_net.stage2', 'focus_net.stage3', 'focus_net.stage4')

# In the order of the forward pass: a stage of blocks, and what stands before its first one (regular expressions).
_STAGES = (
    (r'base_net\.stage1', r'base_net\.downsample1'),
    (r'base_net\.stage2', r'base_net\.downsample2'),
    (r'base_net\.stage3', r'base_net\.downsample3'),
    (r'overview_net\.stage', r'overview_net\.downsample'),
    (r'focus_net\.stage3', r'focus_net\.context_proj'),
    (r'focus_net\.stage4', r'focus_net\.(?:context_)?downsample'),
)

# What only the output of this number, counted from 1, needs.
_NEEDED_BY = {
    4: ('focus_net.downsample', 'focus_net.context_downsample', 'focus_net.stage4'),
    3: ('focus_net', 'overview_net', 'base_net.downsample3', 'base_net.stage3'),
    2: ('base_net.downsample2', 'base_net.stage2'),
}


class TimmOverLoCK(OverLoCK):
    """The ImageNet classifier with timm's interface.

    State dicts are those of `OverLoCK`; entries for an auxiliary head that the model lacks are passed over.

    Args:
        arch: 'xt', 't', 's', 'b', a dict of the fields of `overlock.Arch`, or one.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for the pooled features in front of the classifier.
        global_pool: Pooling of `timm.layers.SelectAdaptivePool2d`; '' for none.
        drop_rate: Dropout in front of the classifier.
        drop_path_rate: The rate of the last block; earlier ones rise to it linearly from 0.
        aux_head: Whether Overview-Net has a classifier of its own: in training the output then is a dict with `main`
            and `aux` logits.
        deploy: Whether to build the folded form of `switch_to_deploy`.
        contmix_backend: Backend of `overlock.ops.contmix`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        num_features: Channels of what `forward_features` returns.
        head_hidden_size: Channels in front of the classifier.
        feature_info: Channels, stride and module of each of the four outputs.
    """

    def __init__(
        self,
        arch: str | Mapping | Arch = 'xt',
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        aux_head: bool = False,
        deploy: bool = False,
        contmix_backend: str = 'auto',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(
                arch,
                in_chans,
                max(num_classes, 1),
                aux_head,
                drop_path_rate,
                deploy=deploy,
                contmix_backend=contmix_backend,
            )
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.arch.out_channels[3]
        self.feature_info = [
            {'num_chs': channels, 'reduction': 4 * 2**i, 'module': module}
            for i, (channels, module) in enumerate(zip(self.arch.out_channels, _FEATURES, strict=True))
        ]
        self.to(dtype=dtype)
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Image (B, C, H, W) to logits (B, num_classes); in training with `aux_head` to `main` and `aux` logits.

        Raises:
            ValueError: If the image is smaller than 32x32.
        """
        outs, overview = self.encode(x)
        logits = self.forward_head(_joined(outs[self.num_outputs - 1]))
        if self.training and self.aux_head is not None:
            return {'main': logits, 'aux': self.aux_head(overview).flatten(1)}
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to the last map (B, num_features, H / 32, W / 32), rounded up."""
        outs, _ = self.encode(x)
        return _joined(outs[self.num_outputs - 1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits (B, num_classes), or to what the classifier takes."""
        x = self.head.pool(self.head.proj(x))
        x = F.dropout(x, self.drop_rate, self.training)
        if not pre_logits:
            x = self.head.fc(x)
        return x.flatten(1) if self.head.pool.pool_type else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The outputs at strides 4, 8, 16 and 32, raw, the third with its context.

        Args:
            x: Image (B, C, H, W).
            indices: Which outputs; the last ones where it is a number, all where it is None.
            norm: Has no effect: the classifier norms no output.
            stop_early: Has no effect: `prune_intermediate_layers` leaves out what is not needed.
            output_fmt: 'NCHW'.
            intermediates_only: Whether to leave out the output of `forward_features`.

        Returns:
            The output of `forward_features` and the list of outputs, or that list alone.
        """
        if output_fmt != 'NCHW':
            raise UserError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, _ = feature_take_indices(self.num_outputs, indices)
        outs, _ = self.encode(x)
        intermediates = [_joined(outs[i]) for i in take_indices]
        return intermediates if intermediates_only else (_joined(outs[self.num_outputs - 1]), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the outputs `indices` do not need, in place, and returns them counted from the first.

        Args:
            indices: See `forward_intermediates`.
            prune_norm: Has no effect: the classifier norms no output.
            prune_head: Whether to remove the head even if the last output stays.
        """
        take_indices, last = feature_take_indices(self.num_outputs, indices)
        head = prune_head or last + 1 < self.num_outputs
        for number in range(self.num_outputs, last + 1, -1):
            for name in _NEEDED_BY[number]:
                parent, _, child = name.rpartition('.')
                delattr(self.get_submodule(parent), child)
        self.num_outputs = last + 1
        self.base_net.num_stages = min(self.num_outputs, 3)
        if self.num_outputs == 3:
            self.focus_net.num_stages = 1
        if head:
            self.num_features = self.arch.out_channels[last]
            self.head.proj = nn.Identity().train(self.training)
            self.aux_head = None
            self.reset_classifier(0, '')
        return take_indices

    def get_classifier(self) -> nn.Module:
        """The last layer of the head."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Gives the heads new classifiers, or none where `num_classes` is 0, and new pooling if asked for."""
        self.num_classes = num_classes
        pool_type = self.head.pool.pool_type if global_pool is None else global_pool
        proj = self.head.proj
        width = self.num_features if isinstance(proj, nn.Identity) else proj.conv.out_channels
        self.head.pool, self.head.fc = self._new_classifier(width, pool_type)
        self.head_hidden_size = width * self.head.pool.feat_mult()
        if self.aux_head is not None:
            _, self.aux_head.fc = self._new_classifier(self.arch.embed_dims[3], 'avg')

    def _new_classifier(self, channels: int, pool_type: str) -> tuple[nn.Module, nn.Module]:
        like = next(self.parameters())
        pool, fc = create_classifier(channels, self.num_classes, pool_type, use_conv=True)
        if isinstance(fc, nn.Conv2d):
            nn.init.trunc_normal_(fc.weight, std=0.02)
            nn.init.zeros_(fc.bias)
        return pool.train(self.training), fc.to(like.device, like.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks recompute their activations in the backward pass to save memory."""
        for net in self.children():
            if isinstance(net, (BaseNet, OverviewNet, FocusNet)):
                net.with_cp = enable

    def no_weight_decay(self) -> set[str]:
        """Scales, shifts and position biases that their shape does not exempt."""
        affine = {
            f'{prefix}.{name}'
            for prefix, module in self.named_modules()
            if isinstance(module, (ChannelAffine, GRN))
            for name, _ in module.named_parameters()
        }
        return affine | {name for name, _ in self.named_parameters() if '.rpb_' in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, str | list[tuple[str, tuple[int, ...] | None]]]:
        """Parameters by depth, a group for each block (`coarse`: each stage); those of the heads are the last."""
        groups = {'stem': r'^base_net\.stem\.'}
        for stage, entry in _STAGES:
            groups[stage] = (
                rf'^(?:{entry}|{stage})\.' if coarse else [(rf'^{entry}\.', (0,)), (rf'^{stage}\.(\d+)\.', None)]
            )
        return groups

    def load_pretrained(self, checkpoint_path: str) -> None:
        """Loads a weight file of any form, adapted to the model's channels and classes; timm calls it for files.

        Of a file that has a running average too, it takes the weights themselves.

        Images of other than three channels take timm's combination of the first weights. Classifiers stay as they are
        where the model has other classes than `pretrained_cfg` says of the file.

        Args:
            checkpoint_path: A name of published weights, a path, or a URL.

        Raises:
            CheckpointError: If the file cannot be found or read, or is not of this model; nothing is loaded then.
        """
        given = from_published(load(checkpoint_path))
        stem = given.get(f'{_FIRST_CONV}.weight')
        if stem is not None and stem.shape[1] == 3 != self.in_chans:
            given[f'{_FIRST_CONV}.weight'] = adapt_input_conv(self.in_chans, stem)
        kept = {}
        if self.num_classes != getattr(self, 'pretrained_cfg', {}).get('num_classes', 1000):
            kept = {name: value for name, value in self.state_dict().items() if name.startswith(_CLASSIFIERS)}
        report = load_state_dict(self, {**given, **kept}, checkpoint_path)
        _logger.info(
            '%s',
            replace(report, loaded=tuple(name for name in report.loaded if name not in kept), new=(*report.new, *kept)),
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if self.aux_head is None:
            for name in [name for name in state_dict if name.startswith(f'{prefix}aux_head.')]:
                del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _rebuilt(self) -> TimmOverLoCK:
        twin = TimmOverLoCK(self.arch, self.in_chans, 0, aux_head=self.aux_head is not None)
        twin.prune_intermediate_layers([self.num_outputs - 1], prune_head=isinstance(self.head.proj, nn.Identity))
        twin.reset_classifier(self.num_classes, self.head.pool.pool_type)
        return twin


def _joined(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """An output as one map: that at stride 16 is a pair of features and context."""
    return out if isinstance(out, Tensor) else torch.cat(out, dim=1)


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of published or our names by ours, for the sources that timm reads itself."""
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
        'first_conv': _FIRST_CONV,
        'classifier': _CLASSIFIERS[0],
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
    weights: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    overlay = dict(pretrained_cfg_overlay or {})
    if kwargs.get('aux_head'):
        overlay.setdefault('classifier', _CLASSIFIERS)
    cfg = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    source = cfg.file or cfg.url
    # Files we read ourselves: older versions of timm run what they hold, and all leave gaps where classes differ.
    if pretrained and source and not (cfg.state_dict or cfg.hf_hub_id or cfg.source):
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


def _entry_point(arch: str, deploy: bool) -> Callable[..., nn.Module]:
    suffix = '_reparam' if deploy else ''
    name, weights = f'overlock_{arch}{suffix}', f'overlock_{arch}_in1k{suffix}'

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, weights, pretrained, **{'arch': arch, 'deploy': deploy, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'OverLoCK-{arch.upper()}{", folded for inference" if deploy else ""}.'
    return register_model(create)


def main() -> None:
    """Runs the script that the command line names, with its arguments."""
    with exit_on_user_error():
        if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
            raise UserError(
                f'expected the path of a script, got {" ".join(sys.argv[1:2]) or "nothing"}; those of timm '
                '(train.py, validate.py, benchmark.py) are in its repository'
            )
        del sys.argv[0]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    # This is a second copy of the module; the models are those of the one that others import.
    from overlock import timm

    timm.main()
else:
    for _arch in ARCHS:
        for _deploy in (False, True):
            _create_fn = _entry_point(_arch, _deploy)
            globals()[_create_fn.__name__] = _create_fn
