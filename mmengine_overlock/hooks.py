"""Hooks: equal statistics in distributed validation, tests of boxes alone, whole checkpoints, early stopping."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from mmengine.dist import broadcast
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmengine_overlock.data.classes import compare_classes
from mmengine_overlock.data.findings import REFUSED, group
from overlock.checkpoint.fitting import compare_weights
from overlock.utils.errors import CheckpointError


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
            CheckpointError: If tensors are missing, unexpected, or of another shape, or if the checkpoint gives
                another label to a class of the data set.
        """
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        state_dict = checkpoint.get('state_dict', checkpoint)
        state_dict = {name.removeprefix('module.'): value for name, value in state_dict.items()}
        compare_weights(model, state_dict, str(runner._load_from)).require(
            'give the configuration that it was trained with'
        )
        meta = checkpoint.get('meta') or {}
        # mmdet 2 and mmseg 0 wrote CLASSES.
        trained = (meta.get('dataset_meta') or {}).get('classes') or meta.get('CLASSES')
        classes = (getattr(runner.visualizer, 'dataset_meta', None) or {}).get('classes')
        if trained and classes:
            _compare_classes(classes, trained, str(runner._load_from))


def _compare_classes(classes: Sequence[str], trained: Sequence[str], checkpoint: str) -> None:
    found: dict[str, list[str]] = defaultdict(list)
    compare_classes(classes, trained, found)
    for finding in group(found):
        message = f'{checkpoint} was trained on other classes than those of the data set: {finding}.'
        if finding.outcome == REFUSED:
            raise CheckpointError(f'{message} Name them in `metainfo` in the order of training.')
        print_log(message, 'current', logging.WARNING)


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
