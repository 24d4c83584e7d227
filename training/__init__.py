"""Training: a folder of images becomes a checkpoint."""
