"""How fast it is, against a plain PyTorch version and against the machine: `python -m benchmarks`."""
