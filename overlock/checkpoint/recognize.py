"""Recognize the network of a state dict by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overlock.checkpoint.fitting import compare_weights
from overlock.models.arch import ARCHS, Arch
from overlock.models.backbone import OverLoCKBackbone
from overlock.models.moganet import MOGANET_ARCHS, MogaArch, MogaNet, MogaNetBackbone
from overlock.models.names import from_published
from overlock.models.network import Network
from overlock.models.overlock import OverLoCK
from overlock.utils.errors import CheckpointError

# The first convolution: of every OverLoCK, by our name and the published one, and of every MogaNet.
_FIRST = ('base_net.stem.0.conv.weight', 'patch_embed1.0.weight')
_FIRST_MOGANET = 'patch_embed1.projection.0.weight'

# Fields of the nets that a backbone leaves out, if no published variant has the others.
_LEAST = Arch((4, 4, 4, 4), (1, 1, 1), 1, (1, 1), (1, 1))


class Recognized(NamedTuple):
    """The network of a state dict."""

    network: Network  # a classifier or backbone with these very tensors, in their form, in evaluation
    prefix: str  # what stands before its names: '' or, in a detector, 'backbone.'
    names: dict[str, str]  # our name of each of its entries, without the prefix, and the name in the state dict


def recognize(state_dict: Mapping[str, Tensor], source: str = 'the state dict') -> Recognized:
    """Recognize the one OverLoCK or MogaNet in a state dict of any form, in our names or the published ones.

    Stages that the state dict lacks are those of a published variant that has the others.

    Raises:
        CheckpointError: If the state dict, called `source` in the message, is not of one whole network.
    """
    prefix = _prefix_of(state_dict, source)
    names = from_published({name.removeprefix(prefix): name for name in state_dict if name.startswith(prefix)})
    tensors = {name: state_dict[given] for name, given in names.items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    try:
        with torch.device('meta'):
            network = _moganet(shapes) if _FIRST_MOGANET in names else _overlock(shapes)
    except (ValueError, IndexError) as error:
        raise CheckpointError(
            f'{source} is neither a classifier nor a backbone: expected head.fc or output_norms of an OverLoCK, or the '
            f'stages of a MogaNet, and what belongs to them ({error}); give a whole file'
        ) from None
    network.eval().to_form(network.form_of(names) or 'training')
    compare_weights(network, tensors, source).require(
        'give a whole file', f'the {type(network).__name__} that its names and shapes tell'
    )
    network.load_state_dict(tensors, assign=True)
    return Recognized(network, prefix, names)


def _overlock(shapes: Mapping[str, tuple[int, ...]]) -> OverLoCK | OverLoCKBackbone:
    known = (arch for arch in ARCHS.values() if _fields(shapes, arch) == vars(arch))
    arch, in_channels = next(known, None) or Arch(**_fields(shapes, _LEAST)), shapes[_FIRST[0]][1]
    if 'head.fc.weight' in shapes:
        return OverLoCK(arch, in_channels, shapes['head.fc.weight'][0], aux_head='aux_head.fc.weight' in shapes)
    indices = [i for i in range(4) if f'output_norms.out{i}.weight' in shapes]
    return OverLoCKBackbone(arch, in_channels, indices, overview_residual='overview_proj.weight' in shapes)


def _moganet(shapes: Mapping[str, tuple[int, ...]]) -> MogaNet | MogaNetBackbone:
    stages = []
    for i in range(1, 5):
        if (shape := shapes.get(f'blocks{i}.0.mlp.fc2.weight')) is not None:
            depth = len({name.split('.')[1] for name in shapes if name.startswith(f'blocks{i}.')})
            stages.append((shape[0], depth, shape[1] // shape[0]))
    archs = {arch: list(zip(*vars(arch).values(), strict=True)) for arch in MOGANET_ARCHS.values()}
    known = (arch for arch, fields in archs.items() if fields[: len(stages)] == stages)
    # Stages that are not there are not built.
    whole = [*stages, *[(8, 1, 1)] * (4 - len(stages))]
    arch, in_channels = next(known, None) or MogaArch(*zip(*whole, strict=True)), shapes[_FIRST_MOGANET][1]
    if 'head.weight' in shapes:
        return MogaNet(arch, in_channels, shapes['head.weight'][0])
    return MogaNetBackbone(arch, in_channels, range(len(stages)))


def _prefix_of(state_dict: Mapping[str, Tensor], source: str) -> str:
    prefixes = {
        name.removesuffix(first)
        for name in state_dict
        for first in (*_FIRST, _FIRST_MOGANET)
        if name == first or name.endswith(f'.{first}')
    }
    if not prefixes:
        raise CheckpointError(
            f'{source} holds no OverLoCK or MogaNet: expected an entry {_FIRST[0]}, {_FIRST[1]} or {_FIRST_MOGANET}, '
            f'alone or behind a prefix such as backbone., got {next(iter(state_dict), "nothing")}; give a file of one'
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            f'{source} holds {len(prefixes)} networks, expected one: below '
            f'{" and ".join(map(repr, sorted(prefixes)))}; give a file of one of them'
        )
    return prefixes.pop()


def _fields(shapes: Mapping[str, tuple[int, ...]], base: Arch) -> dict[str, Any]:
    """Return the fields of `Arch` by the shapes of our entries; those that they do not tell are as in `base`."""

    def side(name: str, axis: int = 0) -> int:
        shape = shapes.get(name)
        return shape[axis] if shape else 0

    def depth(stage: str) -> int:
        return len({name.split('.')[2] for name in shapes if name.startswith(f'{stage}.')})

    def kernel(name: str) -> int:
        # A relative position bias spans all differences of positions in the kernel.
        return (side(name, -1) + 1) // 2

    def ratio(block: str, channels: int) -> int:
        return side(f'{block}.ffn.fc1.weight') // channels

    def each(read: Callable[[str], int], modules: Iterable[str], others: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(read(module) or other for module, other in zip(modules, others, strict=True))

    static = ('base_net.stage1', 'base_net.stage2', 'base_net.stage3', 'overview_net.stage')
    dynamic = ('focus_net.stage3', 'focus_net.stage4')
    entries = ('base_net.stem.3', 'base_net.downsample2', 'base_net.downsample3', 'overview_net.downsample')
    widths = each(lambda module: side(f'{module}.conv.weight'), entries, base.embed_dims)
    return {
        'embed_dims': widths,
        'base_depths': each(depth, static[:3], base.base_depths),
        'overview_depth': depth(static[3]) or base.overview_depth,
        'focus_depths': each(depth, dynamic, base.focus_depths),
        'focus_groups': each(lambda stage: side(f'{stage}.0.rpb_small'), dynamic, base.focus_groups),
        'kernel_sizes': each(lambda stage: side(f'{stage}.0.dilated.conv.weight', -1), static, base.kernel_sizes),
        'dynamic_kernel_sizes': each(lambda stage: kernel(f'{stage}.0.rpb_large'), dynamic, base.dynamic_kernel_sizes),
        'small_kernel_size': kernel(f'{dynamic[0]}.0.rpb_small') or base.small_kernel_size,
        'static_mlp_ratio': ratio(f'{static[0]}.0', widths[0]) or base.static_mlp_ratio,
        'dynamic_mlp_ratio': ratio(f'{dynamic[0]}.0', widths[2]) or base.dynamic_mlp_ratio,
    }
