"""The default run: 20 clients with at most 2 classes of Fashion-MNIST each, a narrow VGG-9, on a CPU.

    python -m mocosfl_jax.train

It takes minutes on two CPU cores and downloads nothing.
"""

from mocosfl_jax.config import Config, quickstart


def get_config() -> Config:
    return quickstart()
