#!/usr/bin/env python
"""Fold a trained detector or segmenter for deployment, write its configuration and compare the predictions."""

import argparse
import sys
from pathlib import Path

# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmengine_overlock.command_line import add_cfg_options, run_command
from mmengine_overlock.deploy import reparameterize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='file of the configuration that the model was trained with')
    parser.add_argument('checkpoint', help='path or URL of the weights, or a name of published ones')
    parser.add_argument('out', metavar='OUT.pth', help='the new weights; the configuration is written to OUT.py')
    parser.add_argument('--image', metavar='FILE', help='the image to compare the results on (default: a drawn scene)')
    parser.add_argument('--ema', action='store_true', help='take the running average of the weights')
    add_cfg_options(parser)
    print(run_command(reparameterize, parser))


if __name__ == '__main__':
    main()
