"""Have a work folder to oneself."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from overlock.utils.errors import UserError
from overlock.utils.files import remove_drafts


@contextmanager
def owned(work_dir: str | Path) -> Iterator[None]:
    """Keep other runs out of a folder while the block runs, and remove what killed runs left half written in it.

    The lock is one of POSIX records: it ends with this process however that ends, the workers that it started do not
    hold it, and NFS keeps it between machines where its servers have locks.

    Raises:
        UserError: Another run has the folder, or it cannot be written to.
    """
    folder = Path(work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / '.lock').open('a+')
    except OSError as error:
        raise UserError(f'{folder} cannot be written ({error}); give another folder with --work-dir.') from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UserError(
                    f'{folder} cannot be locked against other runs ({error}); give a folder of another file '
                    'system with --work-dir.'
                ) from None
            file.seek(0)
            raise UserError(
                f'Another run ({file.read().strip()}) writes to {folder}; end it, or give another folder with '
                '--work-dir.'
            ) from None
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        remove_drafts(folder)
        yield
