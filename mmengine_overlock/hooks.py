"""Hooks: equal statistics in distributed validation, tests of boxes alone, whole checkpoints, early stopping."""

from __future__ import annotations

from typing import Any

from mmengine.dist import broadcast
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from overlock.checkpoint.fitting import compare_weights


class BroadcastBuffersHook(Hook):
    """Give every process the statistics of the first before a validation: those that its checkpoints hold.

    BatchNorms that are not synchronized collect their own in each process.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        for buffer in runner.model.buffers():
            broadcast(buffer)


@HOOKS.register_module()
class BoxesOnlyHook(Hook):
    """Turn the mask heads off for a test, once the checkpoint that holds them is loaded."""

    def before_test(self, runner: Runner) -> None:
        for module in runner.model.modules():
            if hasattr(module, 'mask_head'):
                module.mask_head = None


class WholeModelHook(Hook):
    """Refuse a checkpoint that does not fit every tensor of the model; mmengine only warns."""

    priority = 'LOWEST'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with the model.

        Raises:
            CheckpointError: If tensors are missing, unexpected, or of another shape.
        """
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        state_dict = checkpoint.get('state_dict', checkpoint)
        state_dict = {name.removeprefix('module.'): value for name, value in state_dict.items()}
        compare_weights(model, state_dict, str(runner._load_from)).require(
            'give the configuration that it was trained with'
        )


@HOOKS.register_module()
class EarlyStopHook(EarlyStoppingHook):
    """mmengine's EarlyStoppingHook, except that a resumed run goes on counting, and any better score counts.

    Args:
        monitor, rule, patience: See mmengine.
    """

    # Before the checkpoint hook: the best checkpoint holds the count.
    priority = 'LOW'

    def __init__(self, monitor: str, rule: str | None = None, patience: int = 5) -> None:
        # Scores have three or four digits; the same one again is no better.
        super().__init__(monitor, rule, min_delta=1e-5, patience=patience)

    def before_train(self, runner: Runner) -> None:
        state = runner.message_hub.runtime_info.get('early_stop')
        if state:
            self.best_score, self.wait_count = state

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        super().after_val_epoch(runner, metrics)
        runner.message_hub.update_info('early_stop', [float(self.best_score), self.wait_count])
