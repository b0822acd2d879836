"""Mistakes of the user, and how the tools report them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from overlock.checkpoint import CheckpointError


class UserError(ValueError):
    """Something that the user can put right; the message is one sentence that says how."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with code 2 and one sentence, without a traceback, for a mistake of the user.

    Of the processes of a distributed run only the first on each machine writes the sentence.
    """
    try:
        yield
    except (UserError, CheckpointError) as error:
        ranks = (os.environ.get(name) for name in ('LOCAL_RANK', 'SLURM_LOCALID', 'OMPI_COMM_WORLD_LOCAL_RANK'))
        if next((rank for rank in ranks if rank is not None), '0') == '0':
            sys.stderr.write(f'{error}\n')
        raise SystemExit(2) from error
