"""Run in one process or in many, on one machine or on several."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from timm.utils.distributed import init_distributed_device_so, is_distributed_env, world_info_from_env
from torch import Tensor, distributed

from overlock import keep_freed_memory
from overlock.utils.distributed import check_gpus, leave_group
from overlock.utils.errors import UserError

T = TypeVar('T')


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this is.

    Attributes:
        device: Where this process computes.
        rank: Of this process among all; the first writes the files and the log.
        size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.size > 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.is_distributed:
            distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return a plain value of every process, in the order of their ranks."""
        values = [value] * self.size
        if self.is_distributed:
            distributed.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], T]) -> T:
        """Call a function in every process; a UserError in one of them is raised in all."""
        values: list[T] = []
        error = None
        try:
            values.append(function())
        except UserError as raised:
            error = raised
        for found in filter(None, self.gather(error)):
            raise found
        return values[0]


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """Join the processes that torchrun or Slurm started, if any, and leave together with them.

    Args:
        device: 'cuda', 'cpu' or another device of torch; None for the GPU where there is one.

    Raises:
        UserError: If there is no such device, or no GPU left for this process.
    """
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ''
    if kind not in ('cuda', 'cpu'):
        raise UserError(f'--device takes cuda or cpu, got {device}.')
    if kind == 'cuda':
        if not torch.cuda.is_available():
            raise UserError(f'--device {device} needs a GPU, and PyTorch sees none; take --device cpu.')
        check_gpus()
        torch.backends.cudnn.benchmark = True
    else:
        keep_freed_memory()
    if is_distributed_env() and 'MASTER_ADDR' not in os.environ:
        raise UserError(
            'A run of several processes needs MASTER_ADDR and MASTER_PORT in the environment; start it '
            'with torchrun, or set them.'
        )
    joined = init_distributed_device_so(device)
    yield World(torch.device(joined['device']), joined['global_rank'], joined['world_size'])
    leave_group()


def is_first_process() -> bool:
    """Return whether this process is the first of its run, even before it joins the others."""
    return world_info_from_env()[1] == 0


def log_to_terminal() -> None:
    """Send the log of this package and of overlock to stderr, from the first process of a run only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
    for name in ('imagenet_overlock', 'overlock'):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)
        logger.addHandler(handler)
