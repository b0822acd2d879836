"""Shared by the MMDetection and MMSegmentation plugins: training, testing, checkpoints, checks of the data."""

# Each registers what configurations name.
from mmengine_overlock import amp, hooks, layer_decay, metrics  # noqa: F401
