"""Losses and gradients that are not finite: stop, or leave out the update."""

from __future__ import annotations

import logging
import math
from typing import Any

from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from overlock.utils.errors import UserError
from overlock.utils.finite import UpdateGuard, non_finite


class NonFiniteHook(Hook):
    """Keep what is not finite out of weights and checkpoints; see `overlock.utils.finite.UpdateGuard`.

    Args:
        policy: 'stop' or 'skip', for an update whose loss or gradients are not finite in one of the processes.
    """

    # Before averages of the weights and checkpoints.
    priority = 'ABOVE_NORMAL'

    def __init__(self, policy: str = 'stop') -> None:
        self.policy = policy

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        guard = UpdateGuard(wrapper.optimizer, runner.model, self.policy, scaled=hasattr(wrapper, 'loss_scaler'))
        update_params = wrapper.update_params

        def watched(loss: Any, *args: Any, **kwargs: Any) -> None:
            guard.watch(loss)
            update_params(loss, *args, **kwargs)

        wrapper.update_params = watched
        self.guard = guard

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Go on after an update, or tell what it lacked.

        Raises:
            UserError: In every process, if the run has to end.
        """
        guard = self.guard
        if not runner.optim_wrapper.should_update() or guard.made():
            return
        # The same in all processes, as the decision is.
        terms = {name: float(value) for name, value in (outputs or {}).items()}
        shares = all_gather_object((terms, _images(data_batch)))
        guilty = [(losses, images) for losses, images in shares if not all(map(math.isfinite, losses.values()))]
        what = 'The loss' if guilty else 'A gradient'
        losses = ', '.join(f'{name} {value:.4g}' for name, value in (guilty or shares)[0][0].items())
        images = ', '.join(path for _, paths in guilty or shares for path in paths)
        found = f'{what} of iteration {runner.iter + 1} is not finite ({losses}{"; images: " * bool(images)}{images})'
        if not guard.must_stop:
            print_log(f'{found}: this update was left out, {guard.skipped} so far.', 'current', logging.WARNING)
            return
        row = f' after {guard.in_a_row} updates in a row were left out' if guard.in_a_row > 1 else ''
        raise UserError(
            f'{found}{row}; the weights of this iteration were not saved. Look at these images and their annotations, '
            'lower the learning rate or set optim_wrapper.clip_grad, train without --amp if you use it, or take '
            '--on-nan skip to leave out such updates.'
        )


class FiniteCheckpointHook(Hook):
    """Refuse to save weights, or their average, that are not finite."""

    # After the hook that adds the average.
    priority = 'LOWEST'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Look at the weights, and at their average where there is one.

        Raises:
            UserError: If there are tensors that are not finite.
        """
        for kind in ('state_dict', 'ema_state_dict'):
            if found := non_finite(checkpoint.get(kind, {})):
                raise UserError(
                    f'{len(found)} tensors of the model (first {min(found).removeprefix("module.")}) are not finite '
                    f'after iteration {runner.iter + 1}, and this checkpoint was not written; resume from the one '
                    'before, with a lower learning rate.'
                )


def _images(batch: Any) -> list[str]:
    """Return the paths of the images of a batch, as far as its samples tell them."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    return [str(sample.get('img_path')) for sample in samples or [] if hasattr(sample, 'img_path')]
