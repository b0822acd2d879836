"""Shared by the MMDetection and MMSegmentation plugins: training, testing, checkpoints, checks of the data.

Importing it makes mmengine read checkpoints without running code from them, and write files whole.
"""

# Each registers what configurations name.
from mmengine_overlock import amp, hooks, layer_decay, metrics  # noqa: F401
from mmengine_overlock.checkpoint import use_safe_files

use_safe_files()
