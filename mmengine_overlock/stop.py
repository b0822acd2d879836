"""Stop a training on a signal: save a checkpoint at the end of the iteration, on all processes alike."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from mmengine_overlock.terminal import tell
from overlock.utils.distributed import leave_group

# Slurm sends SIGUSR1 where it is asked to, before it ends a job. Exit codes are those of a shell.
_STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}

CHECKPOINT = 'interrupted.pth'


class StopHook(Hook):
    """Save and exit where any process got SIGTERM, SIGUSR1 or SIGINT.

    A SIGINT before the first iteration, when there is nothing to save, and a second one later interrupt at once.
    All processes agree by the maximum over one number in each iteration.
    """

    # After the checkpoint hook.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._status, self._time, self._begun = 0, 0.0, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the block runs; Python has them in its main thread alone."""
        numbers = _STATUS if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, now = not self._status, time.monotonic()
        if first:
            self._status, self._time = _STATUS[signal.Signals(number)], now
        if number != signal.SIGINT:
            return
        # torchrun passes on the Ctrl-C that its processes have got from the terminal already.
        if not self._begun if first else now - self._time > 1:
            raise KeyboardInterrupt
        if first and is_main_process():
            sys.stderr.write('\nStopping after this iteration, to save it; Ctrl-C again stops at once.\n')

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._begun = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        iteration = runner.iter + 1
        # No checkpoint holds gradients that wait for those of further iterations.
        if iteration % getattr(runner.optim_wrapper, '_accumulative_counts', 1) == 0 and self._agreed():
            self._stop(runner, iteration)

    def before_val(self, runner: Runner) -> None:
        least = torch.tensor(len(runner.val_dataloader))
        all_reduce(least, 'min')
        self._val_iters = int(least)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        # Processes may have different numbers of batches.
        if batch_idx < self._val_iters and self._agreed():
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    # Gives the model its own weights back.
                    hook.after_val_epoch(runner)
            self._stop(runner, runner.iter)

    def _agreed(self) -> bool:
        status = torch.tensor(self._status)
        all_reduce(status, 'max')
        # A signal that came meanwhile stays for the next iteration.
        self._status = int(status) or self._status
        return bool(status)

    def _stop(self, runner: Runner, iteration: int) -> None:
        meta = dict(epoch=runner.epoch, iter=iteration)
        runner.save_checkpoint(runner.work_dir, CHECKPOINT, meta=meta)
        if is_main_process():
            path = Path(runner.work_dir, CHECKPOINT)
            Path(runner.work_dir, 'last_checkpoint').write_text(str(path))
            tell(
                f'Stopped after iteration {iteration} of {runner.max_iters} and saved {path}; to go on, give the same '
                'command with --resume.'
            )
        runner.visualizer.close()
        leave_group()
        raise SystemExit(self._status)


@contextmanager
def tell_the_way_back(work_dir: str | Path) -> Iterator[None]:
    """Let a `KeyboardInterrupt` tell which checkpoint a training in this folder can go on from."""
    try:
        yield
    except KeyboardInterrupt:
        pointer = Path(work_dir, 'last_checkpoint')
        last = pointer.read_text().strip() if pointer.is_file() else ''
        way = f'the last checkpoint is {last}; to go on, give the same command with --resume.'
        raise KeyboardInterrupt(f'Interrupted: {way if last else "nothing was saved."}') from None


def shield_workers(runner: Runner) -> None:
    """Let the workers of a runner's data loaders ignore the signals: launchers and terminals send them to all.

    Before its loops are built. A data loader with a `worker_init_fn` of its own keeps it.
    """
    for name in ('_train_dataloader', '_val_dataloader', '_test_dataloader'):
        loader = getattr(runner, name)
        if isinstance(loader, dict) and 'worker_init_fn' not in loader:
            loader = dict(loader)
            quiet = loader.pop('disable_subprocess_warning', False)
            setattr(runner, name, dict(loader, worker_init_fn=dict(type=ready_worker, quiet=quiet)))


def ready_worker(worker_id: int, quiet: bool = False) -> None:
    """Ignore the signals that stop a training in a worker; with `quiet` all but the first worker give no warnings."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Its data loader ends a worker by SIGTERM, too.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    if quiet and worker_id:
        warnings.simplefilter('ignore')


def _exit_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
