"""What all tests share."""

import logging
import os

import torch

# Without a GPU Triton's interpreter runs our kernels; it has to be asked for before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault('TRITON_INTERPRET', '1')

# pytest keeps whatever is logged, and torch.compile logs each step of its tracing where it sees that somebody does: it
# then takes several times as long.
logging.getLogger('torch.__trace').propagate = False
