"""Shared by the MMDetection and MMSegmentation plugins: training, testing, checkpoints, checks of the data."""
