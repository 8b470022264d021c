"""Parameters in files: encoder files of this package, and checkpoints of the official PyTorch code."""
