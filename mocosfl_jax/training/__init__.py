"""A run of training: build it, compile it, loop, save, resume and report."""
