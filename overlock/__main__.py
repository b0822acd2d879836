"""`python -m overlock` is the command `overlock`."""

import sys

from overlock.cli import main

if __name__ == '__main__':
    sys.exit(main())
