"""An average that a few bad clients cannot move: the trimmed mean (Yin et al. 2018).

python -m mocosfl_jax.train --config=examples/trimmed_mean.py
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from mocosfl_jax import Algorithm, SplitModel, mocosfl
from mocosfl_jax.config import Config, Own, quickstart

TRIM = 0.1  # the share of clients left out at each end


def trimmed_mean(stacked: Any, weights: Array | None) -> Any:
    """The mean of each parameter over the clients [M, ...], without its largest and its smallest values.

    `weights` [M] are those of `config.sync.weighted`. A trimmed mean has no use for them.
    """

    def of_leaf(leaf: Array) -> Array:
        cut = int(TRIM * len(leaf))
        return jnp.mean(jnp.sort(leaf, axis=0)[cut : len(leaf) - cut], axis=0)

    return jax.tree.map(of_leaf, stacked)


def algorithm(config: Any, model: SplitModel, arguments: dict[str, Any]) -> Algorithm:
    """MocoSFL as configured, but for the average of a synchronization."""
    sync = arguments["sync"]._replace(average=trimmed_mean)
    return mocosfl(model, **arguments | {"sync": sync})


def get_config() -> Config:
    config = quickstart()
    config.own = Own(algorithm=algorithm)
    return config
