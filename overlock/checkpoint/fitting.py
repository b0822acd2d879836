"""Compare a state dict with a model, and load weight files that fit."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from overlock.checkpoint.reading import load
from overlock.models.names import form_of, from_published
from overlock.models.overlock import Trunk
from overlock.utils.errors import CheckpointError

# Parts that a dense-prediction backbone adds to the ImageNet network, and parts that it leaves out.
_NEW_PARTS = ('output_norms.', 'overview_proj.', 'overview_scale.')
_DROPPED_PARTS = ('head.', 'aux_head.')
_NETS = ('base_net.', 'overview_net.', 'focus_net.')


@dataclass(frozen=True)
class Fit:
    """How the tensors of a state dict fit a model; as text, what does not.

    Names are ours, in the form of the state dict. Counts of batches need not be there.

    Attributes:
        matching: Tensors that both have, in the order of the model.
        missing: Tensors of the model that the state dict lacks.
        unexpected: Tensors of the state dict that the model does not have.
        misfits: The expected and the received shape of tensors that both have in another shape.
    """

    matching: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def of(cls, state_dict: Mapping[str, Tensor], model: nn.Module, source: str = 'the state dict') -> Fit:
        """Compare a state dict, in published or our names and of any form, with a network or what contains one.

        Raises:
            CheckpointError: If a network in the model cannot take the form of the state dict.
        """
        given, wanted = dict(state_dict), model.state_dict()
        for path, network in model.named_modules():
            if isinstance(network, Trunk):
                prefix = f'{path}.' if path else ''
                given = from_published(given, prefix)
                form = form_of(name for name in given if name.startswith(prefix)) or network.form
                if form != network.form:
                    own = network.unfolded(form, source).state_dict()
                    wanted = {name: value for name, value in wanted.items() if not name.startswith(prefix)}
                    wanted |= {f'{prefix}{name}': value for name, value in own.items()}
        both = [name for name in wanted if name in given]
        misfits = {name: (tuple(wanted[name].shape), tuple(given[name].shape)) for name in both}
        misfits = {name: shapes for name, shapes in misfits.items() if shapes[0] != shapes[1]}
        return cls(
            tuple(name for name in both if name not in misfits),
            tuple(name for name in wanted if name not in given and not name.endswith('num_batches_tracked')),
            tuple(name for name in given if name not in wanted),
            misfits,
        )

    def require(self, source: str, remedy: str, model: str = 'this model') -> None:
        """Check that all fits.

        Args:
            source: What to call the state dict.
            remedy: What to do if it does not fit.
            model: What to call the model.

        Raises:
            CheckpointError: If it does not.
        """
        if self.missing or self.unexpected or self.misfits:
            raise CheckpointError(f'{source} is not for {model}: {self}; {remedy}')

    def __str__(self) -> str:
        first = next(iter(self.misfits), '')
        shapes = ', expected {}, got {}'.format(*self.misfits[first]) if first else ''
        return ', '.join(
            f'{len(names)} tensor{"s"[: len(names) > 1]} {kind} (first {names[0]}{more})'
            for names, kind, more in (
                (list(self.misfits), 'of another shape', shapes),
                (self.missing, 'missing from the file', ''),
                (self.unexpected, 'that the model does not have', ''),
            )
            if names
        )


@dataclass(frozen=True)
class LoadReport:
    """Names, ours and in the form of the file, of what a file gave a model.

    Attributes:
        source: Where the weights came from.
        loaded: Entries that the model took.
        new: Entries of the model that the file does not have; they keep their initial values.
        dropped: Entries of the file that the model has no place for.
    """

    source: str
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f'loaded {len(self.loaded)} tensors from {self.source}; new in the model, left as initialized: '
            f'{_summary(self.new)}; dropped from the file: {_summary(self.dropped)}'
        )


def _summary(names: tuple[str, ...]) -> str:
    if not names:
        return 'none'
    modules = list(dict.fromkeys(name.rpartition('.')[0] for name in names))
    return f'{len(names)} ({", ".join(modules[:12])}{", ..." if len(modules) > 12 else ""})'


def load_pretrained(
    model: Trunk, source: str | os.PathLike[str], prefix: str | None = None, ema: bool = False
) -> LoadReport:
    """Load a weight file into a classifier or a backbone.

    Args:
        model: An `OverLoCK` or `OverLoCKBackbone`.
        source: A name of published weights, a path, or a URL, see `find_file`.
        prefix: Use only the entries below this prefix, without it; by default `backbone.` where the file has it.
        ema: Whether to take the running average of the weights, where the file has both.

    Raises:
        CheckpointError: If the file cannot be found or read, or is not of this model.
    """
    return load_state_dict(model, load(source, ema), os.fspath(source), prefix)


def load_state_dict(
    model: Trunk, state_dict: Mapping[str, Tensor], source: str = 'the state dict', prefix: str | None = None
) -> LoadReport:
    """Load a state dict in published or our names; nothing is loaded unless all that must fit fits.

    A folded model (`deploy=True`) takes the other forms too. Only the norms and the projection of dense prediction may
    be missing, and only classifier heads, and nets that the model leaves out, may be left over.

    Raises:
        CheckpointError: If the state dict is not of this model.
    """
    if prefix is None:
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in state_dict) else ''
    given = from_published(
        {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    )
    fit = Fit.of(given, model, source)
    if not fit.matching and not fit.misfits:
        first = next(iter(state_dict), 'nothing')
        raise CheckpointError(
            f'{source} matches nothing of {type(model).__name__}: expected names like {fit.missing[0]}, got {first}'
        )
    if fit.misfits and all(name.startswith(_DROPPED_PARTS) for name in fit.misfits):
        name, (expected, received) = next(iter(fit.misfits.items()))
        raise CheckpointError(
            f'{source} has other classes: expected {name} of shape {expected}, got {received}; build the model with '
            f'num_classes={received[0]}'
        )
    built = {_stage(name) for name in (*fit.matching, *fit.missing)}
    replace(
        fit,
        missing=tuple(name for name in fit.missing if not name.startswith(_NEW_PARTS)),
        unexpected=tuple(name for name in fit.unexpected if not _may_be_left_over(name, built)),
    ).require(source, 'give the file of the same variant')
    model.load_state_dict({name: given[name] for name in fit.matching}, strict=False)
    return LoadReport(source, fit.matching, fit.missing, fit.unexpected)


def _may_be_left_over(name: str, built: Iterable[str]) -> bool:
    """Tell whether an entry is of another kind of model, or of a stage that the model does not build."""
    return name.startswith(_DROPPED_PARTS + _NEW_PARTS) or (name.startswith(_NETS) and _stage(name) not in built)


def _stage(name: str) -> str:
    return '.'.join(name.split('.')[:2])
