"""Hooks: a progress bar, tests of boxes alone, whole checkpoints."""

from __future__ import annotations

import logging
import sys
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from overlock.checkpoint.fitting import compare_weights


class ProgressBarHook(Hook):
    """Show a bar with the remaining time on a terminal, below the lines of the log."""

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.enabled = is_main_process() and sys.stdout.isatty()
        self.bars: dict[str, tqdm] = {}

    def _open(self, mode: str, total: int, done: int = 0) -> None:
        self.bars[mode] = tqdm(
            total=total,
            initial=done,
            desc=mode,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            disable=not self.enabled,
        )

    def before_run(self, runner: Runner) -> None:
        """Let the logger write to the terminal through tqdm."""
        for handler in runner.logger.handlers if self.enabled else ():
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
                handler.setStream(DummyTqdmFile(sys.stdout))

    def before_train(self, runner: Runner) -> None:
        self._open('train', runner.max_iters, runner.iter)

    def before_val_epoch(self, runner: Runner) -> None:
        self._open('val', len(runner.val_dataloader))

    def before_test_epoch(self, runner: Runner) -> None:
        self._open('test', len(runner.test_dataloader))

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = 'train'
    ) -> None:
        if mode == 'train' and 'train/loss' in runner.message_hub.log_scalars:
            loss = runner.message_hub.get_scalar('train/loss').current()
            self.bars[mode].set_postfix(loss=f'{loss:.4f}', refresh=False)
        self.bars[mode].update()

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.bars['val'].close()

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        self.bars['test'].close()

    def after_train(self, runner: Runner) -> None:
        self.bars['train'].close()


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
