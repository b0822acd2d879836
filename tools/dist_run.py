#!/usr/bin/env python
"""torchrun for dist_train.sh and dist_test.sh: exits like the process that failed first, whose own words suffice."""

import signal
import sys
from pathlib import Path

# A clone that is not installed works too, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from overlock.utils.distributed import exit_on_user_error


def pass_on(number: int, frame: object) -> None:
    """Do with a signal that torchrun does not know what it does with SIGTERM: its processes get it, and may save."""
    raise SignalException(f'Process got signal {number}', signal.Signals(number))


if __name__ == '__main__':
    signal.signal(signal.SIGUSR1, pass_on)
    with exit_on_user_error():
        try:
            main()
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
        except SignalException as error:
            # As a training that was stopped by SIGUSR1 itself.
            sys.exit(143 if error.sigval == signal.SIGUSR1 else 128 + error.sigval)
