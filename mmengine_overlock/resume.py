"""Make a resumed run the uninterrupted one: random numbers by their place in the run, samplers that skip unread."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, Dataset

from overlock.utils.errors import CheckpointError, UserError

# What random numbers are for; each gets numbers of its own.
_ITERATION, _EPOCH, _SAMPLE = range(3)


def seed_all(*place: int) -> None:
    """Seed Python, NumPy and torch with what identifies a place in the run; equal places give equal numbers."""
    state = np.random.SeedSequence(place).generate_state(6)
    random.seed(state[:2].tobytes())
    np.random.seed(state[2:4])
    torch.manual_seed(int.from_bytes(state[4:].tobytes(), 'little'))


def read_samples(dataset: Dataset, batch: Sequence[tuple[Any, tuple[int, ...]]]) -> list[Any]:
    """Read a batch of `SeededBatches`, in a worker or in the main process: each sample with its own random numbers."""
    samples = []
    for index, place in batch:
        seed_all(*place)
        samples.append(dataset[index])
    return samples


class SeededBatches(BatchSampler):
    """Batches of another batch sampler from any of them on, each index with the place in the run that seeds its sample.

    There are none before `begin`: the loop by iterations starts to read when it is built, before it knows where.

    Args:
        sampler: Of indices; its data set reads these batches from now on.
        batch_size: Samples in a batch of this process.
        batches: Configuration of the batch sampler; by default one that cuts the indices as they come.
        drop_last: Whether that default drops a last batch that is not full.
    """

    def __init__(self, sampler: Any, batch_size: int, batches: dict | None = None, drop_last: bool = False) -> None:
        super().__init__(sampler, batch_size, drop_last)
        if batches is None:
            self.batches = BatchSampler(sampler, batch_size, drop_last)
        else:
            self.batches = DATA_SAMPLERS.build(batches, default_args=dict(sampler=sampler, batch_size=batch_size))
        # torch's data loader asks the data set for a whole batch where it has this method.
        sampler.dataset.__getitems__ = functools.partial(read_samples, sampler.dataset)
        self._seed: int | None = None

    def begin(self, seed: int, iteration: int, skip: int, endless: bool) -> None:
        """Set where the next iteration over the batches begins.

        Args:
            seed: Of the run.
            iteration: Number of the first batch in the run.
            skip: How many batches of the epoch, or of the endless stream, come before it.
            endless: Whether passes over the data follow each other without end.
        """
        self._seed, self._iteration, self._skip, self._endless = seed, iteration, skip, endless

    def __iter__(self) -> Iterator[list]:
        if self._seed is None:
            return
        batches = itertools.islice(self._passes() if self._endless else iter(self.batches), self._skip, None)
        for iteration, batch in enumerate(batches, self._iteration):
            place = self._seed, _SAMPLE, iteration, get_rank()
            yield [(index, (*place, position)) for position, index in enumerate(batch)]

    def _passes(self) -> Iterator[list]:
        for epoch in itertools.count():
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            batch = None
            for batch in self.batches:
                yield batch
            if batch is None:
                return

    def __len__(self) -> int:
        return len(self.batches)


class ResumeHook(Hook):
    """Seed iterations and epochs by their place in the run, and begin at the batch that follows the checkpoint's.

    What is random in an iteration depends on seed, iteration and process alone; what is random in a sample on seed,
    iteration, process and position in the batch.
    """

    priority = 'VERY_HIGH'

    _done, _length = 0, 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Take the position within the epoch.

        Raises:
            CheckpointError: The file holds weights only, or an average of them that this run would not go on with.
        """
        if not runner._resume:
            return
        missing = [name for name in ('meta', 'message_hub', 'optimizer') if name not in checkpoint]
        if missing:
            raise CheckpointError(
                f'{runner._load_from} holds no {" and no ".join(missing)}, and no run can go on from it; resume from '
                'another checkpoint, or start from its weights with --cfg-options load_from=FILE.'
            )
        if 'ema_state_dict' in checkpoint and not any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise CheckpointError(
                f'{runner._load_from} was saved with a running average of the weights; resume with --ema, or with the '
                'EMAHook of its configuration.'
            )
        self._done, self._length = checkpoint['meta'].get('epoch_batches', (0, 0))

    def before_train(self, runner: Runner) -> None:
        """Take over the counts of the loop.

        Raises:
            UserError: Processes resumed from different checkpoints, or an epoch that was left has another length now.
        """
        iterations = all_gather_object(runner.iter)
        if len(set(iterations)) > 1:
            raise UserError(
                f'The processes resumed after different iterations ({", ".join(map(str, iterations))}); expected the '
                'same checkpoint on all machines: put the work folder where all see it, or give --resume PATH.'
            )
        loop, length = runner.train_loop, len(runner.train_dataloader)
        if self._done and self._done == self._length:
            self._done = self._length = length
        if self._done and self._length != length:
            raise UserError(
                f'{runner._load_from} was saved within an epoch of {self._length} batches, and an epoch has {length} '
                'now; resume with the same data, batch size and number of processes, or from the end of an epoch.'
            )
        # With `diff_rank_seed` mmengine adds the rank.
        self._seed = runner.seed - get_rank() * bool(runner._randomness_cfg.get('diff_rank_seed'))
        self._epoch_start = runner.iter - self._done
        self._batches = runner.train_dataloader.batch_sampler
        # A run without a configured seed takes the checkpoint's after the samplers were built.
        if hasattr(self._batches.sampler, 'seed'):
            self._batches.sampler.seed = self._seed
        self._endless = isinstance(loop, IterBasedTrainLoop)
        if not self._endless:
            # The loop counts the batches of an epoch from where it starts to read them.
            run_iter = loop.run_iter
            loop.run_iter = lambda _, batch: run_iter(runner.iter - self._epoch_start, batch)

    def before_train_epoch(self, runner: Runner) -> None:
        seed_all(self._seed, _EPOCH, runner.epoch, get_rank())
        skip = runner.iter if self._endless else runner.iter - self._epoch_start
        self._batches.begin(self._seed, runner.iter, skip, self._endless)
        if self._endless:
            # The loop throws away as many batches as there were iterations: let these be none.
            none = itertools.repeat(None, runner.iter)
            runner.train_loop.dataloader_iterator = itertools.chain(none, runner.train_dataloader)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        seed_all(self._seed, _ITERATION, runner.iter, get_rank())

    def after_train_epoch(self, runner: Runner) -> None:
        self._epoch_start = runner.iter

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if not self._endless:
            done = checkpoint['meta']['iter'] - self._epoch_start
            checkpoint['meta']['epoch_batches'] = (done, len(runner.train_dataloader))


def make_resumable(runner: Runner) -> None:
    """Give a runner, before its training loop is built, the hook and the batch sampler of resumable runs."""
    loader = dict(runner._train_dataloader)
    batches = dict(type=SeededBatches, batches=loader.get('batch_sampler'))
    if batches['batches'] is None:
        batches['drop_last'] = loader.pop('drop_last', False)
    runner._train_dataloader = dict(loader, batch_sampler=batches)
    runner.register_hook(ResumeHook())
