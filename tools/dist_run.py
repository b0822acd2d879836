#!/usr/bin/env python
"""torchrun for dist_train.sh and dist_test.sh: exits like the process that failed first, whose own words suffice."""

import sys
from pathlib import Path

# A clone that is not installed works too, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from overlock.utils.distributed import exit_on_user_error

if __name__ == '__main__':
    with exit_on_user_error():
        try:
            main()
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
