"""Mistakes of the user, and how command lines report them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Where torchrun, Slurm and Open MPI tell a process its rank on the machine.
_LOCAL_RANKS = ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK')


class UserError(ValueError):
    """Something that the user can put right; the message is one sentence that says how."""


class CheckpointError(UserError):
    """A weight file that cannot be found, read or used for this model."""


def local_rank() -> int:
    """The rank of this process among those of a distributed run on this machine; 0 without one."""
    return int(next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), 0))


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with code 2 and one sentence, without a traceback, for a mistake of the user.

    Of the processes of a distributed run only the first on each machine writes the sentence.
    """
    try:
        yield
    except UserError as error:
        if local_rank() == 0:
            sys.stderr.write(f'{error}\n')
        raise SystemExit(2) from error
