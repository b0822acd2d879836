"""Keep what is not finite out of the weights of a run and out of its checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from overlock.utils.errors import UserError

POLICIES = ('stop', 'skip')
# This many updates left out in a row end a run. As many halvings take a loss scale from 2^16 to 6e-5: gradients that
# overflow even then do so without it.
LIMIT = 30


class UpdateGuard:
    """Leave out each update whose loss or gradients are not finite in one of the processes.

    It looks before each `optimizer.step()`; what a GradScaler leaves out by itself, it counts.

    Args:
        optimizer: Optimizer of the run.
        model: What it trains. Where the run goes on, buffers return to their values after the last update that was
            made, as the statistics of BatchNorms have seen the same maps as the loss; where a GradScaler left out an
            update, only if they or the loss are not finite.
        policy: 'stop' to end the run at the first such update, 'skip' to go on.
        scaled: Whether a GradScaler leaves out updates, which is usual until it has found its scale.

    Attributes:
        skipped: Number of updates left out so far.
        in_a_row: Number of updates left out since the last one that was made.
        must_stop: Whether the run has to end.

    Raises:
        UserError: If there is no such policy.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, policy: str, scaled: bool = False) -> None:
        if policy not in POLICIES:
            raise UserError(f'What to do with a loss that is not finite is one of {", ".join(POLICIES)}, got {policy}.')
        self.policy, self.scaled = policy, scaled
        self.skipped = self.in_a_row = 0
        self.must_stop = False
        # On a GPU, a run that ends anyway is told later: nothing waits before the step.
        self.may_wait = policy == 'skip' or not optimizer.param_groups[0]['params'][0].is_cuda
        self._buffers = list(model.buffers()) if scaled or policy == 'skip' else []
        self.keep()
        self._losses: list[Tensor] = []
        self._finite: Tensor | None = None
        optimizer.register_step_pre_hook(self._look)

    @torch.no_grad()
    def keep(self) -> None:
        """Take the buffers as they are for those to return to, as where they changed between updates."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    def watch(self, loss: Tensor) -> None:
        """Let the next update depend on this loss, too."""
        self._losses.append(loss.detach())

    @torch.no_grad()
    def _look(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # A GradScaler lets a fused optimizer itself leave out the update.
        if (found := getattr(optimizer, 'found_inf', None)) is not None and found.item():
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group['params'] if p.grad is not None]
        values = [*self._losses, *([torch.nn.utils.get_total_norm(gradients)] if gradients else [])]
        if not values:
            return
        finite = torch.stack([value.isfinite().all() for value in values]).all().int()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(finite, distributed.ReduceOp.MIN)
        if not self.may_wait:
            for gradient in gradients:
                gradient.masked_fill_(finite == 0, 0)
        elif not finite:
            # Without gradients, a step changes neither weights nor its own state.
            optimizer.zero_grad(set_to_none=True)
        self._finite = finite

    def made(self) -> bool:
        """Return whether the last update was made; call it once after each."""
        finite, self._finite = self._finite, None
        losses, self._losses = self._losses, []
        left_out = self.scaled if finite is None else not finite
        if left_out:
            self.skipped += 1
            self.in_a_row += 1
            self.must_stop = self.in_a_row >= (LIMIT if finite is None or self.policy == 'skip' else 1)
        else:
            self.in_a_row = 0
        if self._kept:
            seen = {str(i): tensor for i, tensor in enumerate([*losses, *self._buffers])}
            # Where scaled gradients alone overflow, the statistics are those of finite maps.
            if left_out and (finite is not None or non_finite(seen)):
                torch._foreach_copy_(self._buffers, self._kept)
            else:
                torch._foreach_copy_(self._kept, self._buffers)
        return not left_out


def non_finite(tensors: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinity."""
    return [
        name
        for name, value in tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all()
    ]
