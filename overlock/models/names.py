"""The names of published state dicts, and ours: one table, read both ways; and the form that names tell."""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import NamedTuple, TypeVar

from overlock.utils.errors import CheckpointError

T = TypeVar('T')


def _conv_norm(published: str, number: int, ours: str) -> dict[str, str]:
    """Return the names of a convolution and its BatchNorm, which published files number one after the other."""
    return {f'{published}.{number}': f'{ours}.conv', f'{published}.{number + 1}': f'{ours}.bn'}


_DILATED = {
    'lk_origin': 'conv',
    'origin_bn': 'bn',
    'dil_conv_k#_#': 'branches.k#_d#.conv',
    'dil_bn_k#_#': 'branches.k#_d#.bn',
}

_STATIC_BLOCK = {
    'dwconv': 'dwconv',
    'proj.0': 'norm',
    **{f'proj.1.{a}': f'dilated.{b}' for a, b in _DILATED.items()},
    'proj.2': 'bn',
    'proj.3.proj.1': 'se.fc1',
    'proj.3.proj.3': 'se.fc2',
    'proj.4': 'ffn.fc1',
    'proj.6': 'ffn.dwconv',
    'proj.7': 'ffn.grn',
    'proj.8': 'ffn.fc2',
    'ls': 'ls',
}

_DYNAMIC_BLOCK = {
    **{
        name: name for name in ('dwconv1', 'norm1', 'ls1', 'dwconv2', 'norm2', 'ls2', 'weight_proj', 'proj.0', 'proj.1')
    },
    'rpb1': 'rpb_small',
    'rpb2': 'rpb_large',
    'x_scale': 'context_scale',
    'h_scale': 'prior_scale',
    **_conv_norm('fusion', 0, 'fusion.0'),
    'fusion.3': 'fusion.1',
    'fusion.4': 'fusion.2',
    **_conv_norm('weight_query', 0, 'query'),
    **_conv_norm('weight_key', 1, 'key'),
    **_conv_norm('dyconv_proj', 0, 'dynamic_proj'),
    **{f'lepe.0.{a}': f'local.0.{b}' for a, b in _DILATED.items()},
    'lepe.1': 'local.1',
    'se_layer.proj.1': 'se.fc1',
    'se_layer.proj.3': 'se.fc2',
    **_conv_norm('gate', 0, 'gate'),
    'mlp.0': 'ffn.fc1',
    'mlp.2': 'ffn.dwconv',
    'mlp.3': 'ffn.grn',
    'mlp.4': 'ffn.fc2',
}

_STAGES = {
    'blocks1': ('base_net.stage1', _STATIC_BLOCK),
    'blocks2': ('base_net.stage2', _STATIC_BLOCK),
    'blocks3': ('base_net.stage3', _STATIC_BLOCK),
    'blocks4': ('overview_net.stage', _STATIC_BLOCK),
    'sub_blocks3': ('focus_net.stage3', _DYNAMIC_BLOCK),
    'sub_blocks4': ('focus_net.stage4', _DYNAMIC_BLOCK),
}

_CONTMIX_BLOCK = {
    **{
        published: ours
        for published, ours in _DYNAMIC_BLOCK.items()
        if not published.startswith(('x_scale', 'h_scale', 'fusion', 'dyconv_proj'))
    },
    **_conv_norm('weight_value', 0, 'value'),
    **_conv_norm('fusion_proj', 0, 'dynamic_proj'),
}

# A published module or parameter, and ours; `#` stands for a number that both share.
_NETWORK = {
    **{a: b for i in range(4) for a, b in _conv_norm('patch_embed1', 3 * i, f'base_net.stem.{i}').items()},
    **_conv_norm('patch_embed2', 0, 'base_net.downsample2'),
    **_conv_norm('patch_embed3', 0, 'base_net.downsample3'),
    **_conv_norm('patch_embed4', 0, 'overview_net.downsample'),
    'high_level_proj': 'focus_net.context_proj',
    **_conv_norm('patch_embedx.x_proj', 0, 'focus_net.downsample'),
    **_conv_norm('patch_embedx.h_proj', 0, 'focus_net.context_downsample'),
    **{f'{a}.#.{c}': f'{b}.#.{d}' for a, (b, block) in _STAGES.items() for c, d in block.items()},
    **_conv_norm('head', 0, 'head.proj'),
    'head.4': 'head.fc',
    'aux_head.0': 'aux_head.bn',
    'aux_head.2': 'aux_head.fc',
    **{f'extra_norm.{i}': f'output_norms.out{i}' for i in range(4)},
    'extra_norm.4': 'output_norms.overview',
    'h_proj.0': 'overview_proj',
    'h_proj.1': 'overview_scale',
}


def _renamer(table: Mapping[str, str]) -> Callable[[str], str]:
    """Return the function that renames a module or parameter by a table, and keeps names that the table lacks."""
    rules = []
    for name, other in table.items():
        pattern = re.escape(name).replace(r'\#', r'(\d+)')
        # The numbers, and last what follows the module.
        template = ''.join(rf'{part}\g<{i + 1}>' for i, part in enumerate(other.split('#')))
        rules.append((re.compile(rf'{pattern}(\.\w+)?'), template))

    @cache
    def rename(name: str) -> str:
        for pattern, template in rules:
            if match := pattern.fullmatch(name):
                return match.expand(template)
        return name

    return rename


class Names(NamedTuple):
    """The functions that rename the modules and parameters of one kind of network."""

    to_ours: Callable[[str], str]
    to_published: Callable[[str], str]


def _both_ways(table: Mapping[str, str]) -> Names:
    return Names(_renamer(table), _renamer({ours: published for published, ours in table.items()}))


NETWORK = _both_ways(_NETWORK)
CONTMIX_BLOCK = _both_ways(_CONTMIX_BLOCK)


def form_of(names: Iterable[str]) -> str | None:
    """Return the form that our names tell, see `overlock.models.forms`, or None if they hold too little."""
    names = list(names)
    has_norms = any('.bn.' in name for name in names)
    if any(name.endswith(('dilated.conv.bias', 'local.0.conv.bias')) for name in names):
        return 'merged' if has_norms else 'folded'
    return 'training' if has_norms else None


def from_published(state_dict: Mapping[str, T], prefix: str = '', names: Names = NETWORK) -> dict[str, T]:
    """Rename published entries below `prefix` to our names; all others stay as they are."""
    return {_below(prefix, name, names.to_ours): value for name, value in state_dict.items()}


def to_published(state_dict: Mapping[str, T], prefix: str = '', names: Names = NETWORK) -> dict[str, T]:
    """Rename our entries below `prefix` to the published names; all others stay as they are.

    Raises:
        CheckpointError: If the state dict has the folded form, for which no names were published.
    """
    if form_of(name for name in state_dict if name.startswith(prefix)) == 'folded':
        raise CheckpointError(
            'the state dict has the folded form of switch_to_deploy(), for which there are no '
            'published names; give that of the model before it was folded'
        )
    return {_below(prefix, name, names.to_published): value for name, value in state_dict.items()}


def _below(prefix: str, name: str, rename: Callable[[str], str]) -> str:
    return prefix + rename(name[len(prefix) :]) if name.startswith(prefix) else name
