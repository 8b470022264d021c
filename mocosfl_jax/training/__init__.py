"""A training run: build, compile, train, save, resume and report."""
