"""Save checkpoints so that a whole one is there at every moment."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner

from mmengine_overlock.terminal import tell


class _LateRemoval:
    """mmengine's file backend, except that what is to be removed is only noted."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._noted: list[str] = []

    def remove(self, path: str) -> None:
        self._noted.append(path)

    rmtree = remove

    def remove_now(self, *kept: str | None) -> None:
        """Remove what was noted, except what is there by the same name again."""
        for path in self._noted:
            if path not in kept:
                _remove(self._backend, path)
        self._noted = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def _remove(backend: Any, path: str) -> None:
    if backend.isfile(path):
        backend.remove(path)
    elif backend.isdir(path):
        # DeepSpeed's checkpoints are folders.
        backend.rmtree(path)


@HOOKS.register_module(name='CheckpointHook', force=True)
class LosslessCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, except that an old checkpoint is deleted after the new one is written.

    A resumed run does not touch the best checkpoint of the folder that its own was copied from, and it repeats a
    validation whose result the checkpoint does not hold. Arguments are the same.
    """

    # mmengine sets them without types.
    file_backend: Any
    keep_ckpt_ids: deque[int]

    def before_train(self, runner: Runner) -> None:
        self._localize_best(runner)
        super().before_train(runner)
        if _validation_is_due(runner):
            tell('The resumed checkpoint does not hold the result of its validation: it is repeated.')
            runner.val_loop.run()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        # The checkpoint that is saved again with a best score holds it.
        runner.message_hub.update_info('validated', _progress(runner.train_loop)[0])
        super().after_val_epoch(runner, metrics)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        if isinstance(self.file_backend, _LateRemoval):
            # The new best checkpoint is written.
            self._remove_old_best()
        old: list[int] = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            steps = [*self.keep_ckpt_ids, step]
            old = steps[: -self.max_keep_ckpts]
            # mmengine deletes none where it finds the step at the end.
            self.keep_ckpt_ids = deque(steps, self.max_keep_ckpts)
            # A resumed run deletes the old ones if this one cannot any more.
            runner.message_hub.update_info('keep_ckpt_ids', steps)
        super()._save_checkpoint_with_step(runner, step, meta)
        if is_main_process():
            for step in old:
                _remove(self.file_backend, self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step)))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        backend = self.file_backend
        self.file_backend = _LateRemoval(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
            self._remove_old_best()
        finally:
            self.file_backend = backend

    def _remove_old_best(self) -> None:
        best = getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()
        self.file_backend.remove_now(*best)

    def _localize_best(self, runner: Runner) -> None:
        folder = Path(self.out_dir, Path(runner.work_dir).name) if self.out_dir else Path(runner.work_dir)
        for name, path in list(runner.message_hub.runtime_info.items()):
            if name.startswith('best_ckpt') and path and '://' not in path:
                runner.message_hub.update_info(name, str(folder / Path(path).name))


def _progress(loop: BaseLoop) -> tuple[int, int]:
    """Return how many epochs or iterations a loop has done, whichever it counts its validations by, and of how many."""
    return (loop.iter, loop.max_iters) if isinstance(loop, IterBasedTrainLoop) else (loop.epoch, loop.max_epochs)


def _validation_is_due(runner: Runner) -> bool:
    loop = runner.train_loop
    done, last = _progress(loop)
    if not done or runner.val_loop is None or runner.message_hub.runtime_info.get('validated') == done:
        return False
    loop._decide_current_val_interval()
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == last)
