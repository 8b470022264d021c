"""Speed and memory, compared with a plain PyTorch version and with the machine: `python -m benchmarks`."""
