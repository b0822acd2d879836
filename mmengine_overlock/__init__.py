"""What the MMDetection and MMSegmentation plugins share: training, testing, checkpoints, checks of the data."""
