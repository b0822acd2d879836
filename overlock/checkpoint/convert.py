"""Convert weight files: their names, form, parts and format, with a report on every tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from overlock.checkpoint.download import find_file
from overlock.checkpoint.fitting import check_numbers
from overlock.checkpoint.reading import load, read
from overlock.checkpoint.recognize import recognize
from overlock.models.arch import ARCHS
from overlock.models.moganet import MOGANET_ARCHS, MogaNet, MogaNetTrunk
from overlock.models.names import to_published
from overlock.models.network import Network
from overlock.models.overlock import OverLoCK
from overlock.utils.errors import CheckpointError, UserError
from overlock.utils.files import drafted, whole_file

FATES = ('kept', 'renamed', 'folded', 'dropped', 'added')
_SUFFIXES = ('.pth', '.safetensors')
# The classes in files of detectors and segmenters, by mmengine's name and the older ones.
_CLASSES = ('dataset_meta', 'CLASSES', 'PALETTE')
# Of the outputs before and after folding, in float64 and relative to the largest: the weights are rounded to float32.
_TOLERANCE = 1e-5


class Entry(NamedTuple):
    """The fate of one tensor; a 'folded' one became part of an 'added' one."""

    part: str  # of the network, in our names
    fate: str  # one of `FATES`
    given: str | None  # the name before; None if added
    written: str | None  # the name now; None if folded or dropped


@dataclass(frozen=True)
class Report:
    """The fate of every tensor of a state dict; as text a table by parts.

    Attributes:
        entries: Those of the state dict in its order, then the added ones.
        verified: How the written file was checked.
    """

    entries: tuple[Entry, ...]
    verified: str = ''

    def __str__(self) -> str:
        parts = [*dict.fromkeys(entry.part for entry in self.entries), 'all']
        width = max(map(len, parts))
        lines = [f'{"part":<{width}}' + ''.join(f'{fate:>9}' for fate in FATES)]
        for part in parts:
            fates = [entry.fate for entry in self.entries if part in (entry.part, 'all')]
            lines.append(f'{part:<{width}}' + ''.join(f'{fates.count(fate):>9}' for fate in FATES))
        return '\n'.join(lines)

    def details(self) -> str:
        """Return a line for each tensor: its fate, its name before and its name now."""
        return '\n'.join(f'{entry.fate:<8} {entry.given or "-"} -> {entry.written or "-"}' for entry in self.entries)


def convert(
    state_dict: Mapping[str, Tensor],
    names: str = 'ours',
    form: str | None = None,
    backbone: bool = False,
    source: str = 'the state dict',
) -> tuple[dict[str, Tensor], Report]:
    """Convert the state dict of a classifier, backbone, detector or segmenter; heads of the last two stay as they are.

    Args:
        state_dict: In our names or the published ones, of any form; it is not changed.
        names: 'ours' or 'published'.
        form: 'merged' or 'folded', see `overlock.models.forms`; None for that of the state dict. Tensors narrower
            than float32 become float32 by it, to keep their digits.
        backbone: Whether to keep the backbone of a detector alone, without its prefix.
        source: What to call the state dict in messages.

    Returns:
        The new state dict, in the order of the network, which may share memory with the old one; and the report.

    Raises:
        CheckpointError: If the state dict is not of one whole network, or cannot be brought into that form.
    """
    network, prefix, given_names = recognize(state_dict, source)
    if backbone and isinstance(network, (OverLoCK, MogaNet)):
        raise CheckpointError(
            f'{source} is of a classifier, expected a detector or segmenter to take the backbone of; '
            'backbones load a classifier as it is'
        )
    tensors = {name: state_dict[given_names[name]] for name in network.state_dict() if name in given_names}
    if form not in (None, network.form):
        # A new network is in float32: loading widens narrower tensors.
        network = network.twin(network.form).to_form(form, source)
        network.load_state_dict(tensors, assign=True)
        tensors = dict(network.state_dict())
    if names == 'published' and network.form == 'folded':
        raise CheckpointError(
            f'{source} has the folded form of switch_to_deploy(), for which there are no published names; give the '
            'file that it was made from'
        )
    renamed = to_published(tensors) if names == 'published' else tensors
    new_names = {name: f'{"" if backbone else prefix}{new}' for name, new in zip(tensors, renamed, strict=True)}
    converted = {new_names[name]: value for name, value in tensors.items()}

    our_names = {given: name for name, given in given_names.items()}
    entries = []
    for given, value in state_dict.items():
        if given not in our_names:
            part, fate, new = given.partition('.')[0], 'dropped' if backbone else 'kept', None if backbone else given
            if new:
                converted[new] = value
        else:
            name = our_names[given]
            part, new = prefix + name.partition('.')[0], new_names.get(name)
            if new and torch.equal(converted[new], value.to(converted[new].dtype)):
                fate = 'kept' if new == given else 'renamed'
            else:
                fate, new = 'folded', None
        entries.append(Entry(part, fate, given, new))
    used = {entry.written for entry in entries}
    added = {name: new for name, new in new_names.items() if new not in used}
    entries += [Entry(prefix + name.partition('.')[0], 'added', None, new) for name, new in added.items()]
    return converted, Report(tuple(entries))


def convert_file(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    names: str = 'ours',
    form: str | None = None,
    backbone: bool = False,
    ema: bool = False,
) -> Report:
    """Convert a weight file; the new file takes its name only after it was read back and loaded.

    It holds a bare state dict; a .pth file of a whole detector or segmenter is wrapped as mmengine does, with the names
    and colors of its classes.

    Args:
        source: A name of published weights, a path, or a URL.
        out: The new file; .pth or .safetensors.
        names: See `convert`; so are `form` and `backbone`.
        ema: Whether to take the running average of the weights.

    Returns:
        What became of each tensor, and how the file was verified.

    Raises:
        CheckpointError: See `convert`; also if the new file does not hold what it should.
        UserError: If `out` is no name for a new weight file.
    """
    source, out = os.fspath(source), Path(os.path.expanduser(out))
    path = find_file(source)
    if out.suffix not in _SUFFIXES or out.is_dir():
        raise UserError(f'the output must be a file that ends in {" or ".join(_SUFFIXES)}, got {out}')
    if out.exists() and out.samefile(path):
        raise UserError(f'the output {out} is the file that is converted; give another name, so that nothing is lost')
    given = load(source, ema)
    # Heads have no network here to be compared with.
    check_numbers(given, source)
    converted, report = convert(given, names, form, backbone, source)
    # Files hold the whole memory of a view.
    tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in converted.items()}
    with drafted(out) as (draft,):
        write_weights(draft, tensors, read_classes(path) if recognize(tensors).prefix else None)
        return replace(report, verified=_verify(draft, tensors, given))


def write_weights(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any] | None) -> None:
    """Write a .pth file, wrapped as mmengine does if there is `meta`, or a .safetensors file."""
    # torch.save would write the name of a path into the file.
    with whole_file(path) as file:
        if path.suffix == '.safetensors':
            try:
                from safetensors.torch import save
            except ImportError:
                raise UserError(
                    f'{path.name} needs the package safetensors; install it with `pip install safetensors`'
                ) from None
            file.write(save(dict(tensors), {'format': 'pt'}))
        else:
            torch.save(tensors if meta is None else {'state_dict': tensors, 'meta': meta}, file)


def read_classes(path: Path) -> dict[str, Any]:
    """Read the classes from a file of a detector or segmenter; empty for a .safetensors file."""
    content = read(path)
    meta = content.get('meta') if isinstance(content, Mapping) else None
    return {name: meta[name] for name in _CLASSES if name in meta} if isinstance(meta, Mapping) else {}


def _verify(draft: Path, tensors: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Read a file back, load it strictly, and compare its outputs with the old ones if the form changed."""
    read = load(draft)
    if read.keys() != tensors.keys() or any(_bits(read[name]) != _bits(value) for name, value in tensors.items()):
        raise CheckpointError(
            f'{draft.name} does not hold what was written to it, and was discarded; check the disk and convert again'
        )
    network, old = recognize(read).network, recognize(given).network
    archs = MOGANET_ARCHS if isinstance(network, MogaNetTrunk) else ARCHS
    variant = next((name for name, arch in archs.items() if arch == network.arch), 'an arch of its own')
    text = (
        f'{len(read)} tensors read back bit for bit, loaded strictly into {type(network).__name__} ({variant}, '
        f'{network.form} form)'
    )
    if network.form == old.form:
        return text
    deviation = largest_deviation(_outputs(network), _outputs(old))
    if not deviation <= _TOLERANCE:
        raise CheckpointError(
            f'{draft.name} was discarded: its outputs on a random image deviate by {deviation:.1e} '
            f'of the largest, expected at most {_TOLERANCE:.0e}; check that the weights are finite'
        )
    return f'{text}, outputs on a random image within {deviation:.1e} of the largest'


def _bits(value: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    # NaN is not equal to itself.
    return value.dtype, value.shape, value.flatten().view(torch.uint8).numpy().tobytes()


@torch.no_grad()
def _outputs(network: Network) -> Sequence[Tensor]:
    """Compute the outputs for a small random image in float64, so that only the weights are rounded."""
    x = torch.rand(1, network.in_channels, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outs = network.double()(x)
    return [outs] if isinstance(outs, Tensor) else outs


def largest_deviation(outs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest deviation of tensors, each relative to its largest magnitude; NaN if one is NaN."""
    deviations = [
        (a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny)
        for a, b in zip(outs, expected, strict=True)
    ]
    # Python's max would ignore NaN.
    return torch.stack(deviations).max().item()
