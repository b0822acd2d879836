#!/usr/bin/env python
"""Export a classifier, detector, segmenter or backbone: the command `overlock export`."""

import sys
from pathlib import Path

# A clone that is not installed works too, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from overlock.cli import run_command

if __name__ == '__main__':
    sys.exit(run_command('export'))
