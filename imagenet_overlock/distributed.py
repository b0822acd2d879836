"""Runs of one process or of many, on one machine or several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env
from torch import Tensor, distributed

from overlock import keep_freed_memory
from overlock.utils.distributed import check_gpus
from overlock.utils.errors import UserError

T = TypeVar('T')


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is.

    Attributes:
        device: Where this process computes.
        rank: Of this process among all.
        local_rank: Of this process among those of its machine.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are other processes."""
        return self.size > 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.is_distributed:
            distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """A plain value of every process, in the order of their ranks."""
        if not self.is_distributed:
            return [value]
        values: list = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def once_per_machine(self, function: Callable[[], T]) -> T:
        """What a function gives in the first process of this machine; a UserError there is one in every process."""
        value, sentence = None, ''
        if self.local_rank == 0:
            try:
                value = function()
            except UserError as error:
                sentence = str(error)
        self.raise_together(sentence)
        return self.gather(value)[self.rank - self.local_rank]

    def raise_together(self, sentence: str) -> None:
        """Raises, in every process, a UserError with the first sentence that any of them has; '' is none."""
        sentence = next(filter(None, self.gather(sentence)), '')
        if sentence:
            raise UserError(sentence)


def is_first_process() -> bool:
    """Whether this process is the first of its run, before the run is joined too."""
    return world_info_from_env()[1] == 0


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Joins the other processes that torchrun or Slurm started, if it did; leaves together with them.

    Args:
        device: 'cuda', 'cpu' or another device of torch; None for the GPU where there is one.

    Raises:
        UserError: If there is no such device, or no GPU left for this process.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    kind = _kind(device)
    if kind == 'cpu':
        keep_freed_memory()
    elif kind == 'cuda':
        torch.backends.cudnn.benchmark = True
    distributed_run = is_distributed_env()
    if distributed_run and 'MASTER_ADDR' not in os.environ:
        raise UserError(
            'A run of several processes needs MASTER_ADDR and MASTER_PORT in the environment; start it '
            'with torchrun, or set them.'
        )
    joined = init_distributed_device_so(device)
    world = World(torch.device(joined['device']), joined['global_rank'], joined['local_rank'], joined['world_size'])
    yield world
    if distributed_run:
        # At exit, a process whose peers are gone already can abort.
        distributed.barrier()
        if kind == 'cpu':
            # Gloo's threads need the interpreter's lock to let go of the last tensors, and whoever destroys the group
            # waits for them while holding it: seen as a deadlock on busy machines.
            time.sleep(1)
        distributed.destroy_process_group()


def _kind(device: str) -> str:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f'--device takes a device of PyTorch such as cuda or cpu, got {device}.') from error
    if kind not in ('cuda', 'cpu'):
        raise UserError(f'--device takes cuda or cpu, got {device}.')
    if kind == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'--device {device} needs a GPU, and PyTorch sees none; take --device cpu.')
        check_gpus()
    return kind
