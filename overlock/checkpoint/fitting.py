"""Compare a state dict with a model, and load weight files that fit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from overlock.checkpoint.reading import load
from overlock.models.network import Network
from overlock.utils.errors import CheckpointError


@dataclass(frozen=True)
class LoadReport:
    """Names, ours and in the form of the file, of what a file gives a model.

    Attributes:
        source: Where the weights come from.
        loaded: Entries that the model takes, in its order.
        new: Entries of the model that the file does not have, counts of batches left out; they keep their values.
        dropped: Entries of the file that the model has no place for.
        misfits: The expected and the received shape of entries that both have in another shape.
        flaws: Why entries that both have cannot be weights of the model, such as integers or NaN for real numbers.
    """

    source: str
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    flaws: Mapping[str, str] = field(default_factory=dict)

    def require_numbers(self) -> None:
        """Raise a CheckpointError if entries are no weights."""
        if self.flaws:
            name, flaw = next(iter(self.flaws.items()))
            raise CheckpointError(
                f'{self.source} holds {len(self.flaws)} tensor{"s"[: len(self.flaws) > 1]} that cannot be weights '
                f'(first {name}: {flaw}); give a file of a training that went well'
            )

    def require(self, remedy: str, model: str = 'this model') -> None:
        """Raise a CheckpointError with a remedy unless the file is of the whole model and nothing else."""
        self.require_numbers()
        shapes = [', expected {}, got {}'.format(*shapes) for shapes in self.misfits.values()]
        reasons = [
            f'{len(names)} tensor{"s"[: len(names) > 1]} {kind} (first {names[0]}{more})'
            for names, kind, more in (
                (list(self.misfits), 'of another shape', ''.join(shapes[:1])),
                (self.new, 'missing from the file', ''),
                (self.dropped, 'that the model does not have', ''),
            )
            if names
        ]
        if reasons:
            raise CheckpointError(f'{self.source} is not for {model}: {", ".join(reasons)}; {remedy}')

    def __str__(self) -> str:
        return (
            f'loaded {len(self.loaded)} tensors from {self.source}; new in the model, left as initialized: '
            f'{_summary(self.new)}; dropped from the file: {_summary(self.dropped)}'
        )


def _summary(names: tuple[str, ...]) -> str:
    parts = dict.fromkeys(name.partition('.')[0] for name in names)
    return f'{len(names)} ({", ".join(parts)})' if names else 'none'


def compare_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str = 'the state dict') -> LoadReport:
    """Compare a state dict, in published or our names and of any form, with a network or what contains one.

    Raises:
        CheckpointError: If a network in the model cannot take the form of the state dict.
    """
    given, wanted = dict(state_dict), model.state_dict()
    for path, network in model.named_modules():
        if isinstance(network, Network):
            prefix = f'{path}.' if path else ''
            given = network.to_own_names(given, prefix)
            form = network.form_of(name for name in given if name.startswith(prefix))
            if form not in (None, network.form):
                twin = network.twin(form, source).state_dict()
                wanted = {name: value for name, value in wanted.items() if not name.startswith(prefix)}
                wanted |= {f'{prefix}{name}': value for name, value in twin.items()}
    flaws = {name: _flaw(given[name], value) for name, value in wanted.items() if name in given}
    shapes = {
        name: (tuple(wanted[name].shape), tuple(given[name].shape)) for name in flaws if isinstance(given[name], Tensor)
    }
    return LoadReport(
        source,
        loaded=tuple(name for name, (expected, received) in shapes.items() if expected == received),
        new=tuple(name for name in wanted if name not in given and not name.endswith('num_batches_tracked')),
        dropped=tuple(name for name in given if name not in wanted),
        misfits={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        flaws={name: flaw for name, flaw in flaws.items() if flaw},
    )


def check_numbers(state_dict: Mapping[str, Tensor], source: str) -> None:
    """Check that a state dict holds no NaN, infinity or complex numbers.

    Raises:
        CheckpointError: It does.
    """
    flaws = {name: _flaw(value, value) for name, value in state_dict.items()}
    LoadReport(source, (), (), (), flaws={name: flaw for name, flaw in flaws.items() if flaw}).require_numbers()


def _flaw(value: Any, wanted: Tensor) -> str:
    """Say why a value cannot be the entry `wanted` of a model; '' if it can. Floats of all widths are alike."""
    if not isinstance(value, Tensor):
        return f'a {type(value).__name__}, expected a tensor'
    if value.is_meta:
        return '' if wanted.is_meta else 'a shape without values'
    if value.is_complex() or (wanted.is_floating_point() and not value.is_floating_point()):
        return f'{value.dtype}, expected {wanted.dtype}'
    if not value.is_floating_point() or not value.numel():
        return ''
    # torch has no minimum of floats of 8 bits. Both ends are NaN where one value is.
    numbers = value.detach().float() if value.dtype.itemsize == 1 else value.detach()
    if all(math.isfinite(end.item()) for end in torch.aminmax(numbers)):
        return ''
    return f'{int((~numbers.isfinite()).sum())} of {value.numel()} values are NaN or infinite'


def load_pretrained(
    model: Network, source: str | os.PathLike[str], prefix: str | None = None, ema: bool = False
) -> LoadReport:
    """Load a weight file into a classifier or a backbone, see `load_state_dict`.

    Args:
        model: A classifier or a backbone.
        source: A name of published weights, a path, or a URL, see `find_file`.
        prefix: Use only the entries below this prefix, without it; by default `backbone.` where the file has it.
        ema: Whether to take the running average of the weights, where the file has both.

    Raises:
        CheckpointError: If the file cannot be found or read, or is not of this model.
    """
    return load_state_dict(model, load(source, ema), os.fspath(source), prefix)


def load_state_dict(
    model: Network, state_dict: Mapping[str, Tensor], source: str = 'the state dict', prefix: str | None = None
) -> LoadReport:
    """Load a state dict in published or our names; nothing is loaded unless all that must fit fits.

    A folded model (`deploy=True`) takes the other forms too. Only the norms and the projection of dense prediction may
    be missing, and only classifier heads, and nets that the model leaves out, may be left over.

    Raises:
        CheckpointError: If the state dict is not of this model.
    """
    if prefix is None:
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in state_dict) else ''
    given = model.to_own_names(
        {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    )
    report = compare_weights(model, given, source)
    remedy = 'give the file of the same variant'
    if report.misfits and all(name.startswith(model.head_parts) for name in report.misfits):
        _, received = next(iter(report.misfits.values()))
        remedy = f'build the model with num_classes={received[0]}'
    built = {model.stage_of(name) for name in (*report.loaded, *report.new)}
    replace(
        report,
        new=tuple(name for name in report.new if not name.startswith(model.new_parts)),
        dropped=tuple(
            name
            for name in report.dropped
            if not name.startswith(model.head_parts + model.new_parts)
            and (model.stage_of(name) in built or not name.startswith(model.stage_parts))
        ),
    ).require(remedy)
    model.load_state_dict({name: given[name] for name in report.loaded}, strict=False)
    return report
