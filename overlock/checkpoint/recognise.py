"""Recognize the network of a state dict by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from overlock.checkpoint.fitting import Fit
from overlock.models.arch import ARCHS, Arch
from overlock.models.backbone import OverLoCKBackbone
from overlock.models.names import form_of, from_published
from overlock.models.overlock import OverLoCK, Trunk
from overlock.utils.errors import CheckpointError

# The first convolution, which every OverLoCK has, by our name and the published one.
_FIRST = ('base_net.stem.0.conv.weight', 'patch_embed1.0.weight')

# Fields of the nets that a backbone leaves out, if no published variant has the others.
_LEAST = Arch((4, 4, 4, 4), (1, 1, 1), 1, (1, 1), (1, 1))


def prefix_of(names: Iterable[str], source: str = 'the state dict') -> str:
    """Return the prefix of the one OverLoCK in a state dict: '' or, in a detector, 'backbone.'.

    Raises:
        CheckpointError: If there is no OverLoCK, or more than one.
    """
    names = list(names)
    prefixes = {
        name.removesuffix(first) for name in names for first in _FIRST if name == first or name.endswith(f'.{first}')
    }
    if not prefixes:
        raise CheckpointError(
            f'{source} holds no OverLoCK: expected an entry {_FIRST[0]} or {_FIRST[1]}, alone or '
            f'behind a prefix such as backbone., got {names[0] if names else "nothing"}; give a file '
            'of an OverLoCK'
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f'{source} holds {len(prefixes)} OverLoCKs, expected one: below '
            f'{" and ".join(repr(prefix) for prefix in sorted(prefixes))}; give a file of one of '
            'them'
        )
    return prefixes.pop()


def network_entries(state_dict: Mapping[str, Tensor], source: str = 'the state dict') -> dict[str, str]:
    """Return our names of the entries of the network, without a prefix, each with its name in the state dict.

    Raises:
        CheckpointError: If there is no one OverLoCK, or an entry is there under both its names.
    """
    prefix = prefix_of(state_dict, source)
    given = [name for name in state_dict if name.startswith(prefix)]
    entries = from_published({name.removeprefix(prefix): name for name in given})
    if len(entries) < len(given):
        twice = next(name for name in given if name not in entries.values())
        raise CheckpointError(
            f'{source} has {twice} under our name and the published one, expected one of them; give '
            'a file in one kind of names'
        )
    return entries


def arch_of(state_dict: Mapping[str, Tensor], source: str = 'the state dict') -> Arch:
    """Return the variant of the OverLoCK in a state dict of any form, in our names or the published ones.

    Nets that the state dict lacks are taken from a variant that fits the others.

    Raises:
        CheckpointError: If it is not of one OverLoCK.
    """
    entries = network_entries(state_dict, source)
    found = _fields({name: tuple(state_dict[given].shape) for name, given in entries.items()})
    for arch in ARCHS.values():
        if all(
            value in (None, ours)
            for field, values in found.items()
            for value, ours in zip(values, _as_tuple(getattr(arch, field)), strict=True)
        ):
            return arch
    filled: dict[str, Any] = {}
    for field, values in found.items():
        least = getattr(_LEAST, field)
        whole = tuple(other if value is None else value for value, other in zip(values, _as_tuple(least), strict=True))
        filled[field] = whole if isinstance(least, tuple) else whole[0]
    try:
        return Arch(**filled)
    except ValueError as error:
        raise CheckpointError(f'{source} is not of an OverLoCK ({error}); give a whole file') from error


def _as_tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _fields(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | None, ...]]:
    """Return the fields of `Arch` by the shapes of our entries; None if they do not tell."""

    def side(name: str, axis: int = 0) -> int | None:
        shape = shapes.get(name, ())
        return shape[axis] if shape else None

    def depth(stage: str) -> int | None:
        return len({name.split('.')[2] for name in shapes if name.startswith(f'{stage}.')}) or None

    def kernel(name: str) -> int | None:
        # A relative position bias spans all differences of positions in the kernel.
        span = side(name, -1)
        return span and (span + 1) // 2

    def ratio(block: str, channels: int | None) -> int | None:
        hidden = side(f'{block}.ffn.fc1.weight')
        return hidden // channels if hidden and channels else None

    static = ('base_net.stage1', 'base_net.stage2', 'base_net.stage3', 'overview_net.stage')
    dynamic = ('focus_net.stage3', 'focus_net.stage4')
    widths = tuple(
        side(f'{module}.conv.weight')
        for module in ('base_net.stem.3', 'base_net.downsample2', 'base_net.downsample3', 'overview_net.downsample')
    )
    return {
        'embed_dims': widths,
        'base_depths': tuple(depth(stage) for stage in static[:3]),
        'overview_depth': (depth(static[3]),),
        'focus_depths': tuple(depth(stage) for stage in dynamic),
        'focus_groups': tuple(side(f'{stage}.0.rpb_small') for stage in dynamic),
        'kernel_sizes': tuple(side(f'{stage}.0.dilated.conv.weight', -1) for stage in static),
        'dynamic_kernel_sizes': tuple(kernel(f'{stage}.0.rpb_large') for stage in dynamic),
        'small_kernel_size': (kernel(f'{dynamic[0]}.0.rpb_small'),),
        'static_mlp_ratio': (ratio(f'{static[0]}.0', widths[0]),),
        'dynamic_mlp_ratio': (ratio(f'{dynamic[0]}.0', widths[2]),),
    }


def build_like(state_dict: Mapping[str, Tensor], source: str = 'the state dict') -> Trunk:
    """Build the classifier or backbone of a state dict, in its form, in evaluation and on the meta device.

    Raises:
        CheckpointError: If the state dict is not of one whole OverLoCK.
    """
    arch, entries = arch_of(state_dict, source), network_entries(state_dict, source)
    form = form_of(entries)
    shapes = {name: tuple(state_dict[given].shape) for name, given in entries.items()}
    try:
        in_channels = shapes[_FIRST[0]][1]
        model: Trunk
        with torch.device('meta'):
            if 'head.fc.weight' in entries:
                num_classes = shapes['head.fc.weight'][0]
                model = OverLoCK(arch, in_channels, num_classes, aux_head='aux_head.fc.weight' in entries)
            else:
                indices = [i for i in range(4) if f'output_norms.out{i}.weight' in entries]
                overview_residual = 'overview_proj.weight' in entries
                model = OverLoCKBackbone(arch, in_channels, indices, overview_residual=overview_residual)
    except (ValueError, IndexError) as error:
        raise CheckpointError(
            f'{source} is neither an OverLoCK classifier nor a backbone of one: expected head.fc or '
            f'output_norms and what belongs to them ({error}); give a whole file'
        ) from error
    model.to_form(form or 'training')
    Fit.of({name: state_dict[given] for name, given in entries.items()}, model).require(
        source, 'give a whole file', f'the {type(model).__name__} that its names and shapes tell'
    )
    return model.eval()
