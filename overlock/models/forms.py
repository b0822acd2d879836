"""The three forms of a network's state dict, told by names, and the way from the unfolded ones to the folded one.

'training': as the network is built. 'merged': the dilated branches are one kernel and all BatchNorms are there; the
form of published `_reparam` files. 'folded': what `switch_to_deploy` leaves.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overlock.utils.errors import CheckpointError


def form_of(names: Iterable[str]) -> str | None:
    """'training', 'merged' or 'folded' by our names; None where too little of a network is there to tell."""
    names = list(names)
    normed = any('.bn.' in name for name in names)
    if any(name.endswith(('.dilated.conv.bias', '.local.0.conv.bias')) for name in names):
        return 'merged' if normed else 'folded'
    return 'training' if normed else None


def must_fold(given: str | None, wanted: str | None, source: str = 'the state dict') -> bool:
    """Whether a state dict of form `given` is to be folded for a model of form `wanted`; not if it fits as it is.

    Raises:
        CheckpointError: If the model cannot take it at all.
    """
    if given is None or given == wanted:
        return False
    if wanted != 'folded':
        raise CheckpointError(
            f'{source} has the {given} form, out of which no {wanted} form can be made; build the '
            f'model with deploy=True, or give a file of the {wanted} form'
        )
    return True


@dataclass(frozen=True)
class Folded:
    """What came of folding a state dict; all names are ours.

    Attributes:
        tensors: What the folded model is to load.
        missing: Entries of the unfolded form that the state dict lacks.
        unexpected: Entries of the state dict that neither the unfolded form nor the model has a place for.
        misfits: (expected, received) shapes of entries that do not fit; they were not used.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    misfits: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


def fold_state_dict(given: Mapping[str, Tensor], own: Mapping[str, Tensor], build: Callable[[], nn.Module]) -> Folded:
    """Folds an unfolded state dict, without touching its tensors.

    A folded tensor is replaced only where the state dict has all that it is made of. Tensors of fewer digits than the
    model's are folded, and stored, in the dtype of the model.

    Args:
        given: Tensors by our names, of the form that `build` builds.
        own: The state dict of the folded model.
        build: Makes the unfolded network on the meta device.
    """
    twin = build()
    shapes = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    # Folding does not ask how many batches there were.
    missing = [name for name in shapes if name not in given and not name.endswith('num_batches_tracked')]
    misfits = {
        name: (shape, tuple(given[name].shape))
        for name, shape in shapes.items()
        if name in given and given[name].shape != shape
    }
    dtype = next(value.dtype for value in own.values() if value.is_floating_point())
    usable = {
        name: _widen(value.detach(), dtype) for name, value in given.items() if name in shapes and name not in misfits
    }
    unusable = {*missing, *misfits}
    device = next((value.device for value in usable.values()), torch.device('cpu'))
    filler = {name: torch.zeros((), dtype=dtype, device=device).expand(shapes[name]) for name in unusable}
    twin.load_state_dict({**usable, **filler}, strict=False, assign=True)
    folded = twin.switch_to_deploy().state_dict()
    incomplete = _made_from(unusable, build()) if unusable else set()
    others = {name: value for name, value in given.items() if name not in shapes}
    tensors = {name: own[name] if name in incomplete else value for name, value in folded.items()}
    tensors.update((name, value) for name, value in others.items() if name in own)
    return Folded(tensors, missing, [name for name in others if name not in own], misfits)


def _widen(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(torch.promote_types(value.dtype, dtype)) if value.is_floating_point() else value


def _made_from(names: set[str], twin: nn.Module) -> set[str]:
    """Names in the folded form of what any of `names` goes into: that is where not-a-number there comes out."""
    marked = {
        name: torch.full((), float('nan') if name in names else 0.0, device='cpu').expand(value.shape)
        for name, value in twin.state_dict().items()
        if value.is_floating_point()
    }
    twin.load_state_dict(marked, strict=False, assign=True)
    return {name for name, value in twin.switch_to_deploy().state_dict().items() if value.isnan().any()}
