"""Keep the remarks of libraries from the user."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# What it changes is the process's: of two threads at once, the later would restore what the earlier had changed.
_lock = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings, and logs below errors, of what runs inside."""
    with _lock:
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                yield
        finally:
            logging.disable(before)
