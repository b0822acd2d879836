"""Run a script of timm's repository with the models registered: `python -m overlock.timm SCRIPT ARGS...`."""

import runpy
import sys
from pathlib import Path

from overlock.utils.distributed import exit_on_user_error
from overlock.utils.errors import UserError


def main() -> None:
    """Run the script that the command line names, with its arguments."""
    with exit_on_user_error():
        if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
            raise UserError(
                f'expected the path of a script, got {" ".join(sys.argv[1:2]) or "nothing"}; those of timm '
                '(train.py, validate.py, benchmark.py) are in its repository'
            )
        del sys.argv[0]
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
