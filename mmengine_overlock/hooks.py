"""Hooks: equal statistics in distributed validation, tests of boxes alone, whole checkpoints."""

from __future__ import annotations

from typing import Any

from mmengine.dist import broadcast
from mmengine.hooks import Hook
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
