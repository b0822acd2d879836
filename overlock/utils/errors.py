"""Errors that a user can put right, and faults of the machine, each in one sentence."""

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec('P')
T = TypeVar('T')


class UserError(ValueError):
    """Something that the user can put right; the message is one sentence that says how."""


class CheckpointError(UserError):
    """A weight file that cannot be found, read or used for this model."""


def brief_mistakes(function: Callable[P, T]) -> Callable[P, T]:
    """Let a `UserError` leave a function without the calls and errors behind it; `__context__` keeps its cause."""

    @functools.wraps(function)
    def brief(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UserError as error:
            raise error.with_traceback(None) from None

    return brief


# What the system, Python, PyTorch and NumPy say -> what is wrong, and the remedy. Wrappers (registries, workers that
# load data, torch.save) keep these words, but neither the class nor the number of an error. The first that fits counts.
_FAULTS = {
    r'(out of|insufficient) shared memory|/torch_\d': (
        'The shared memory of this machine or container is full',
        'enlarge /dev/shm (docker run --shm-size=8g), or load data with fewer workers',
    ),
    'No space left on device|Disk quota exceeded|File too large|inline_container.*unexpected pos': (
        'The disk is full',
        'free space or name another folder; what was written before is whole, and training goes on with --resume',
    ),
    'Permission denied|Read-only file system|Operation not permitted': (
        'A file or folder cannot be read or written',
        'change its permissions, or name another folder: of the outputs by the options of the tool, of caches by '
        'XDG_CACHE_HOME, of temporary files by TMPDIR',
    ),
    'No usable temporary directory': (
        'There is no folder for temporary files',
        'name one that is writable and not full by TMPDIR',
    ),
    r'Not a directory|\[Errno 17\] File exists': (
        'A file stands where a folder is needed',
        'remove it, or name another folder',
    ),
    'EADDRINUSE|Address already in use': (
        'The port of this run is in use by another program',
        'name a free one: PORT=29501 before tools/dist_train.sh and tools/dist_test.sh, else MASTER_PORT=29501',
    ),
    r"out of memory|[Cc]an't allocate memory|Cannot allocate memory|Unable to allocate|Insufficient memory|MemoryError|"
    r'bad_alloc|STATUS_ALLOC_FAILED|killed by signal: Killed': (
        'The memory does not suffice',
        'lower the batch size, the image size or the number of workers, take --amp, or recompute activations in '
        'training (model.backbone.with_cp=True, on ImageNet --grad-checkpointing); what was written before is whole, '
        'and training goes on with --resume',
    ),
    'ould not determine (the )?home directory': ('This user has no home folder', 'name a folder for caches by HOME'),
    'gloo/transport|ncclRemoteError|ncclSystemError|remote process exited': (
        'Another process of this run ended or cannot be reached',
        'its own last words say why',
    ),
    'Too many open files': ('This process has opened all the files that it may', 'raise the limit: ulimit -n 65536'),
}


def explain_fault(error: BaseException | None) -> str | None:
    """Return one sentence on a fault of the machine and its remedy, by an error or its causes; None for others."""
    while error is not None:
        text = str(error) or type(error).__name__
        for words, (wrong, remedy) in _FAULTS.items():
            if found := re.search(words, text):
                # torch appends a C++ stack, and a worker that loads data its traceback.
                line = next(line.strip() for line in text.splitlines() if found[0] in line)
                return f'{wrong}; {remedy} ({line}).'
        error = error.__cause__
    return None
