"""Other optimizers: Adam on the clients and LARS on the server, from Optax.

python -m mocosfl_jax.train --config=examples/optimizers.py
"""

from typing import Any

import optax

from mocosfl_jax import Algorithm, SplitModel, mocosfl
from mocosfl_jax.config import Config, Own, quickstart


def algorithm(config: Any, model: SplitModel, arguments: dict[str, Any]) -> Algorithm:
    """MocoSFL as configured, but for these two arguments."""
    optimizers = {"client_optimizer": optax.adam(1e-3), "server_optimizer": optax.lars(0.1)}
    return mocosfl(model, **arguments | optimizers)


def get_config() -> Config:
    config = quickstart()
    config.own = Own(algorithm=algorithm)
    return config
