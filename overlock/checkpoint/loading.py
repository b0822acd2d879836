"""Loading pretrained weights into a model, strictly where it matters, with a report."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from overlock.checkpoint.reading import load
from overlock.models.forms import form_of, must_fold
from overlock.models.names import from_published
from overlock.utils.errors import CheckpointError

# What a dense-prediction backbone adds to the ImageNet network, and what it leaves out.
NEW_PARTS = ('output_norms.', 'overview_proj.', 'overview_scale.')
DROPPED_PARTS = ('head.', 'aux_head.')


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
            f'loaded {len(self.loaded)} tensors from {self.source}; new in the model, left as initialised: '
            f'{_summary(self.new)}; dropped from the file: {_summary(self.dropped)}'
        )


def _summary(names: tuple[str, ...]) -> str:
    if not names:
        return 'none'
    modules = dict.fromkeys(name.rpartition('.')[0] for name in names)
    shown = list(modules)[:12]
    return f'{len(names)} ({", ".join(shown)}{", ..." if len(modules) > len(shown) else ""})'


def _stage(name: str) -> str:
    return '.'.join(name.split('.')[:2])


def _is_net(name: str) -> bool:
    return name.startswith(('base_net.', 'overview_net.', 'focus_net.'))


def load_pretrained(
    model: nn.Module, source: str | os.PathLike, prefix: str | None = None, ema: bool = False
) -> LoadReport:
    """Loads a weight file into a classifier or a backbone.

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
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str = 'the state dict', prefix: str | None = None
) -> LoadReport:
    """Loads a state dict in published or our names; nothing is loaded unless all that must fit fits.

    A model of the folded form (`deploy=True`) takes the other forms too. Only the norms and the projection of dense
    prediction may be missing, and only classifier heads, and nets that the model leaves out, may be left over.

    Raises:
        CheckpointError: If the state dict is not of this model.
    """
    if prefix is None:
        prefix = 'backbone.' if any(name.startswith('backbone.') for name in state_dict) else ''
    given = {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}
    given = from_published(given)
    wanted = model.state_dict()
    form = form_of(given)
    if must_fold(form, form_of(wanted), source):
        wanted = model.unfolded(form).state_dict()
    loaded = tuple(name for name in wanted if name in given)
    new = tuple(name for name in wanted if name not in given)
    dropped = tuple(name for name in given if name not in wanted)
    if not any(name.endswith('.weight') for name in loaded):
        first = next(iter(state_dict), 'nothing')
        raise CheckpointError(
            f'{source} matches nothing of {type(model).__name__}: expected names like {next(iter(wanted))}, got {first}'
        )
    misfits = [name for name in loaded if given[name].shape != wanted[name].shape]
    if misfits:
        name = misfits[0]
        if all(name.startswith(DROPPED_PARTS) for name in misfits):
            raise CheckpointError(
                f'{source} has other classes: expected {name} of shape {tuple(wanted[name].shape)}, got '
                f'{tuple(given[name].shape)}; build the model with num_classes={len(given[name])}'
            )
        raise CheckpointError(
            f'{source} is not for this model: {len(misfits)} of {len(loaded)} tensors have another shape, first '
            f'{name}, expected {tuple(wanted[name].shape)}, got {tuple(given[name].shape)}; give the file of the same '
            'variant'
        )
    absent = [name for name in new if not name.startswith(NEW_PARTS) and not name.endswith('num_batches_tracked')]
    # Stages that the model leaves out as a whole, for want of outputs behind them, may be in the file.
    built = {_stage(name) for name in wanted}
    excess = [
        name
        for name in dropped
        if not name.startswith(DROPPED_PARTS + NEW_PARTS) and (not _is_net(name) or _stage(name) in built)
    ]
    if absent or excess:
        raise CheckpointError(
            f'{source} is not for this model: it lacks {_summary(tuple(absent))} and has {_summary(tuple(excess))} '
            f'that the model does not; give the file of the same variant and form'
        )
    model.load_state_dict({name: given[name] for name in loaded}, strict=False)
    return LoadReport(source, loaded, new, dropped)
