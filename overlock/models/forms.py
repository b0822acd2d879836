"""The three forms of a network, and loading weights of one form into a network of a later one.

*Training*: the network as it is built. *Merged*: the dilated branches beside each large kernel are merged into it, the
BatchNorms around stay; published `_reparam` files have this form. *Folded*: all that is linear is folded into
convolutions and no BatchNorm is left; `switch_to_deploy()`, `deploy=True` and the `_reparam` models of timm give this
form. A network may be merged and then folded; there is no way back.
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from overlock.layers import DilatedReparamConv
from overlock.layers.fold import switch_children
from overlock.models.names import Names, form_of, from_published
from overlock.utils.errors import CheckpointError

FORMS = ('training', 'merged', 'folded')

Self = TypeVar('Self', bound='Foldable')
T = TypeVar('T')


def check_form(given: str, wanted: str, source: str) -> None:
    """Raise a CheckpointError if `given`, the form of `source`, is later than the form that is to be made out of it."""
    if FORMS.index(given) > FORMS.index(wanted):
        raise CheckpointError(
            f'{source} has the {given} form, out of which no {wanted} form can be made; give the file that it was made '
            'from, or build the model with deploy=True'
        )


class Foldable(nn.Module):
    """A network that can be merged and folded.

    It loads state dicts in our names and the published ones, at any prefix, of its own form and of earlier ones.

    Attributes:
        names: Renames published entries; None where the names are the published ones.
    """

    names: Names | None = None

    @classmethod
    def to_own_names(cls, state_dict: Mapping[str, T], prefix: str = '') -> dict[str, T]:
        """Rename published entries below `prefix` to the names of the network; all others stay as they are."""
        return from_published(state_dict, prefix, cls.names) if cls.names else dict(state_dict)

    @staticmethod
    def form_of(names: Iterable[str]) -> str | None:
        """Return the form that names of the network tell, or None if they hold too little."""
        return form_of(names)

    @property
    def form(self) -> str:
        """Return the form of the network: 'training', 'merged' or 'folded'."""
        return self.form_of(self.state_dict()) or 'training'

    def switch_to_deploy(self: Self) -> Self:
        """Fold all linear steps for inference, in place and idempotently, and return self.

        The running statistics become part of the weights in either mode. In training drop path still drops branches,
        with the bias of the layer scale that was folded into them.
        """
        switch_children(self)
        return self

    def to_form(self: Self, form: str, source: str = 'the network') -> Self:
        """Merge or fold the network in place, and return it.

        Raises:
            CheckpointError: If the network, called `source` in the message, has a later form.
        """
        check_form(self.form, form, source)
        if form == 'merged':
            for module in self.modules():
                if isinstance(module, DilatedReparamConv):
                    module.switch_to_deploy()
        return self.switch_to_deploy() if form == 'folded' else self

    def twin(self: Self, form: str, source: str = 'the state dict') -> Self:
        """Return a new network of the same shape in the form of `source`, on the meta device.

        Raises:
            CheckpointError: If that form is later than the form of this network.
        """
        check_form(form, self.form, source)
        with torch.device('meta'):
            return self._rebuilt().to_form(form)

    def _rebuilt(self: Self) -> Self:
        """Return a new network of the same shape in the training form."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Rename published entries, and bring those of an earlier form to the form of this network.

        The network itself keeps its parameters: an optimizer may hold them already.
        """
        tensors = self.to_own_names({name.removeprefix(prefix): value for name, value in state_dict.items()})
        form = self.form_of(tensors)
        if form not in (None, self.form):
            tensors = self._in_own_form(tensors, form)
        # In place: the children are given what is in `state_dict` after this.
        state_dict.clear()
        state_dict.update((f'{prefix}{name}', value) for name, value in tensors.items())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _in_own_form(self, tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
        """Merge or fold tensors of another form; those that no network of this shape has stay as they are."""
        twin, dtype = self.twin(form), next(self.parameters()).dtype
        own = {name: tensors[name] for name in twin.state_dict() if name in tensors}
        # Narrow tensors widen first, to keep their digits.
        wide = {
            name: value.to(torch.promote_types(value.dtype, dtype)) if value.is_floating_point() else value
            for name, value in own.items()
        }
        missing = twin.load_state_dict(wide, strict=False, assign=True).missing_keys
        parts = {name.partition('.')[0] for name in own}
        gaps = [name for name in missing if name.partition('.')[0] in parts]
        if gaps:
            raise CheckpointError(
                f'the state dict has the {form} form and lacks {len(gaps)} tensors (first {gaps[0]}), without which it '
                f'cannot be brought to the {self.form} form of the model; give a whole file'
            )
        brought = twin.to_form(self.form).state_dict()
        return {
            **{name: value for name, value in brought.items() if name.partition('.')[0] in parts},
            **{name: value for name, value in tensors.items() if name not in own},
        }
