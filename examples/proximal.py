"""Clients that stay near their last synchronization: a proximal term (FedProx, Li et al. 2020).

python -m mocosfl_jax.train --config=examples/proximal.py
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mocosfl_jax import Algorithm, SplitModel, mocosfl
from mocosfl_jax.config import Config, Own, quickstart


def proximal(params: Any, synchronized: Any, strength: float) -> Array:
    """strength / 2 * the squared distance of a client's parameters from those of its last synchronization."""
    squares = jax.tree.map(lambda p, s: jnp.sum(jnp.square(p - s)), params, synchronized)
    return strength / 2 * jax.tree.reduce(jnp.add, squares)


def algorithm(config: Any, model: SplitModel, arguments: dict[str, Any]) -> Algorithm:
    """MocoSFL as configured, with a further term of each client's loss."""
    return mocosfl(model, client_loss=partial(proximal, strength=0.1), **arguments)


def get_config() -> Config:
    config = quickstart()
    config.own = Own(algorithm=algorithm)
    return config
