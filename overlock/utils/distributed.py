"""Distributed runs: the rank of this process, a GPU for each process, and errors that one process reports for all."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from overlock.utils.errors import UserError

# Where torchrun, Open MPI and Slurm tell a process its rank on the machine, and how many processes there are on it.
# Slurm comes last: the other two may have been started inside one of its jobs.
_LOCAL_RANKS = ('LOCAL_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'SLURM_LOCALID')
_LOCAL_SIZES = ('LOCAL_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_SIZE', 'SLURM_NTASKS_PER_NODE')


def local_rank() -> int:
    """Return the rank of this process among those of a distributed run on this machine; 0 outside such a run."""
    return int(next((os.environ[name] for name in _LOCAL_RANKS if os.environ.get(name)), 0))


def check_gpus() -> None:
    """Check that each process on this machine has a CUDA device of its own.

    Raises:
        UserError: There are more processes than devices. Every process raises it, so that the first can report it.
    """
    # The command line answers without torch.
    import torch

    processes = int(next((os.environ[name] for name in _LOCAL_SIZES if os.environ.get(name)), local_rank() + 1))
    if processes > torch.cuda.device_count():
        raise UserError(
            f'There are {processes} processes on this machine, but each sees {torch.cuda.device_count()} '
            'GPUs; start at most one process for each GPU.'
        )


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into its sentence on stderr and exit code 2, without a traceback.

    In a distributed run only the first process on each machine writes the sentence.
    """
    try:
        yield
    except UserError as error:
        if local_rank() == 0:
            sys.stderr.write(f'{error}\n')
        raise SystemExit(2) from error
