"""Parameters in files: our encoder files, and checkpoints of the official code."""
