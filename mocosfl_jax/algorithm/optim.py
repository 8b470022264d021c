"""SGD as PyTorch defines it, and learning-rate schedules over epochs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

SCHEDULES = ("cosine", "multistep", "constant")
Schedule = Callable[[Array], Array]  # training step [] int32 -> learning rate []


def sgd(momentum: float = 0.9, weight_decay: float = 5e-4) -> optax.GradientTransformation:
    """g += weight_decay * p; m <- momentum * m + g; direction m. The learning rate is `descend`'s.

    Leaving the rate out keeps the state free of counters, so that a client that sits out an epoch
    still follows the schedule of the whole run.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum))


SGD = sgd()


def rate(learning_rate: Schedule | float, step: Array) -> Array:
    """The learning rate at training step `step` [], of a schedule or of a constant."""
    return learning_rate(step) if callable(learning_rate) else jnp.asarray(learning_rate)


def descend(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, learning_rate: Array
) -> tuple[Any, Any]:
    """One step of `optimizer`: p <- p - learning_rate * direction. Returns params and opt_state.

    Every operation is element-wise, so trees stacked over clients are updated as they are.
    """
    direction, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, d: p - (learning_rate * d).astype(p.dtype), params, direction), opt_state


def schedule(name: str, base: float, *, epochs: int, steps_per_epoch: int, decay: float = 0.1) -> Schedule:
    """A learning rate that changes from epoch to epoch (Li et al. 2023, section 4).

    Args:
      name: "cosine" (from `base` down to 0), "multistep" (times `decay` at 60 % and at 80 % of the
        epochs; the paper's clients take 0.2) or "constant".
      base: rate of the first epoch.
      epochs: length of the run.
      steps_per_epoch: training steps an epoch.
      decay: factor of "multistep".

    Raises:
      ValueError: for another name.
    """

    if name not in SCHEDULES:
        raise ValueError(f"schedule: found {name!r}, allowed: {', '.join(SCHEDULES)}")

    def at(step: Array) -> Array:
        epoch = step // steps_per_epoch
        if name == "cosine":
            return base * 0.5 * (1 + jnp.cos(jnp.pi * epoch / epochs))
        if name == "multistep":
            drops = (epoch >= int(0.6 * epochs)).astype(int) + (epoch >= int(0.8 * epochs)).astype(int)
            return base * jnp.power(decay, drops)
        return jnp.full(jnp.shape(step), base)

    return at
