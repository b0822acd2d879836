"""The names of published state dicts, and ours: one table, read both ways; and the forms that names tell.

Glossary of the forms. *Training*: the network as it is built. *Merged*: the dilated branches beside each large kernel
are merged into it, the BatchNorms around stay; published `_reparam` files have this form. *Folded*: all that is linear
is folded into convolutions and no BatchNorm is left; `switch_to_deploy()`, `deploy=True` and the `_reparam` models of
timm give this form. A network may be merged and then folded; there is no way back. A network takes files of its own
form and of earlier ones.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TypeVar

from overlock.utils.errors import CheckpointError

FORMS = ('training', 'merged', 'folded')

T = TypeVar('T')

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
    'rpb1': 'rpb_small',
    'rpb2': 'rpb_large',
    'x_scale': 'context_scale',
    'h_scale': 'prior_scale',
    'dwconv1': 'dwconv1',
    'norm1': 'norm1',
    'fusion.0': 'fusion.0.conv',
    'fusion.1': 'fusion.0.bn',
    'fusion.3': 'fusion.1',
    'fusion.4': 'fusion.2',
    'weight_query.0': 'query.conv',
    'weight_query.1': 'query.bn',
    'weight_key.1': 'key.conv',
    'weight_key.2': 'key.bn',
    'weight_proj': 'weight_proj',
    'dyconv_proj.0': 'dynamic_proj.conv',
    'dyconv_proj.1': 'dynamic_proj.bn',
    **{f'lepe.0.{a}': f'local.0.{b}' for a, b in _DILATED.items()},
    'lepe.1': 'local.1',
    'se_layer.proj.1': 'se.fc1',
    'se_layer.proj.3': 'se.fc2',
    'gate.0': 'gate.conv',
    'gate.1': 'gate.bn',
    'proj.0': 'proj.0',
    'proj.1': 'proj.1',
    'ls1': 'ls1',
    'dwconv2': 'dwconv2',
    'norm2': 'norm2',
    'mlp.0': 'ffn.fc1',
    'mlp.2': 'ffn.dwconv',
    'mlp.3': 'ffn.grn',
    'mlp.4': 'ffn.fc2',
    'ls2': 'ls2',
}

# A published module or parameter, and ours; `#` stands for a number that both share.
_TABLE = {
    **{f'patch_embed1.{3 * i}': f'base_net.stem.{i}.conv' for i in range(4)},
    **{f'patch_embed1.{3 * i + 1}': f'base_net.stem.{i}.bn' for i in range(4)},
    'patch_embed2.0': 'base_net.downsample2.conv',
    'patch_embed2.1': 'base_net.downsample2.bn',
    'patch_embed3.0': 'base_net.downsample3.conv',
    'patch_embed3.1': 'base_net.downsample3.bn',
    'patch_embed4.0': 'overview_net.downsample.conv',
    'patch_embed4.1': 'overview_net.downsample.bn',
    'high_level_proj': 'focus_net.context_proj',
    'patch_embedx.x_proj.0': 'focus_net.downsample.conv',
    'patch_embedx.x_proj.1': 'focus_net.downsample.bn',
    'patch_embedx.h_proj.0': 'focus_net.context_downsample.conv',
    'patch_embedx.h_proj.1': 'focus_net.context_downsample.bn',
    **{
        f'{a}.#.{tail}': f'{b}.#.{our_tail}'
        for a, b in (
            ('blocks1', 'base_net.stage1'),
            ('blocks2', 'base_net.stage2'),
            ('blocks3', 'base_net.stage3'),
            ('blocks4', 'overview_net.stage'),
        )
        for tail, our_tail in _STATIC_BLOCK.items()
    },
    **{
        f'{a}.#.{tail}': f'{b}.#.{our_tail}'
        for a, b in (('sub_blocks3', 'focus_net.stage3'), ('sub_blocks4', 'focus_net.stage4'))
        for tail, our_tail in _DYNAMIC_BLOCK.items()
    },
    'head.0': 'head.proj.conv',
    'head.1': 'head.proj.bn',
    'head.4': 'head.fc',
    'aux_head.0': 'aux_head.bn',
    'aux_head.2': 'aux_head.fc',
    **{f'extra_norm.{i}': f'output_norms.out{i}' for i in range(4)},
    'extra_norm.4': 'output_norms.overview',
    'h_proj.0': 'overview_proj',
    'h_proj.1': 'overview_scale',
}


def _compile(table: Mapping[str, str]) -> list[tuple[re.Pattern[str], str]]:
    """Return (pattern, template) of each entry; a pattern matches a module and its parameters."""
    rules = []
    for name, other in table.items():
        pattern = re.escape(name).replace(r'\#', r'(\d+)')
        template = ''.join(rf'{part}\g<{i + 1}>' for i, part in enumerate(other.split('#')))
        rules.append((re.compile(rf'{pattern}(\.\w+)?'), template))
    return rules


_TO_OURS = _compile(_TABLE)
_TO_PUBLISHED = _compile({ours: published for published, ours in _TABLE.items()})


@cache
def _rename(name: str, to_ours: bool) -> str:
    """Return the other name of an entry, or `name` if the table has none."""
    for pattern, template in _TO_OURS if to_ours else _TO_PUBLISHED:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(template)
    return name


def form_of(names: Iterable[str]) -> str | None:
    """Return the form that our names tell, or None if they hold too little of a network."""
    names = list(names)
    has_norms = any('.bn.' in name for name in names)
    if any(name.endswith(('.dilated.conv.bias', '.local.0.conv.bias')) for name in names):
        return 'merged' if has_norms else 'folded'
    return 'training' if has_norms else None


def check_form(given: str, wanted: str, source: str = 'the state dict') -> None:
    """Check that one form can be made out of another.

    Raises:
        CheckpointError: If `given` is the later one.
    """
    if FORMS.index(given) > FORMS.index(wanted):
        raise CheckpointError(
            f'{source} has the {given} form, out of which no {wanted} form can be made; give the file that it was made '
            'from, or build the model with deploy=True'
        )


def from_published(state_dict: Mapping[str, T], prefix: str = '') -> dict[str, T]:
    """Rename published entries below `prefix` to our names; all others stay as they are."""
    return {_under(name, prefix, True): value for name, value in state_dict.items()}


def to_published(state_dict: Mapping[str, T], prefix: str = '') -> dict[str, T]:
    """Rename our entries below `prefix` to the published names; all others stay as they are.

    Raises:
        CheckpointError: If the state dict has the folded form, for which no names were published.
    """
    if form_of(name for name in state_dict if name.startswith(prefix)) == 'folded':
        raise CheckpointError(
            'the state dict has the folded form of switch_to_deploy(), for which there are no '
            'published names; give that of the model before it was folded'
        )
    return {_under(name, prefix, False): value for name, value in state_dict.items()}


def _under(name: str, prefix: str, to_ours: bool) -> str:
    if not name.startswith(prefix):
        return name
    return prefix + _rename(name[len(prefix) :], to_ours)
