"""Distributed runs: rank, a GPU for each process, the end of a run, and errors in one sentence each."""

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from overlock.utils.errors import UserError, explain_fault

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


def leave_group() -> None:
    """Leave the default process group, if there is one, together with all other processes."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return
    # At exit, a process whose peers are gone already can abort.
    distributed.barrier()
    if distributed.get_backend() == 'gloo':
        # Gloo's threads need the interpreter's lock to free the last tensors. `destroy_process_group` holds that lock
        # while it waits for them (a deadlock), and an interpreter that ends takes it away (an abort).
        time.sleep(1)
    distributed.destroy_process_group()


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn mistakes of the user and faults of the machine into a sentence on stderr and exit code 2.

    Ctrl-C ends the process with code 130, after what the `KeyboardInterrupt` says. Other errors keep their traceback.
    A log file that cannot be written ends the process too, instead of one traceback for each line. In a distributed run
    only the first process on each machine tells a `UserError`, which all of them raise; every process tells the fault
    that it meets.
    """
    handle_error = logging.FileHandler.handleError
    logging.FileHandler.handleError = _raise_again  # type: ignore[assignment, method-assign]
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if local_rank() == 0:
            sys.stderr.write(f'\n{str(interrupt) or "Interrupted: what this command makes is not complete."}\n')
        raise SystemExit(130) from None
    except Exception as error:
        mistake = isinstance(error, UserError)
        sentence = str(error) if mistake else explain_fault(error)
        if sentence is None:
            raise
        if local_rank() == 0 or not mistake:
            sys.stderr.write(f'{sentence}\n')
        else:
            # torchrun ends the first process, which is to tell, as soon as another one has ended.
            time.sleep(1)
        raise SystemExit(2) from error
    finally:
        logging.FileHandler.handleError = handle_error  # type: ignore[method-assign]


def _raise_again(handler: logging.Handler, record: logging.LogRecord) -> None:
    raise  # noqa: PLE0704  # logging calls this while it handles the error
