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
    """SGD as in PyTorch, without a learning rate: g += weight_decay * p, then m = momentum * m + g.

    `descend` multiplies the direction m by the learning rate. Without a rate the state has no step counter,
    so a client that sits out an epoch still follows the schedule of the whole run.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum))


SGD = sgd()


def rate(learning_rate: Schedule | float, step: Array) -> Array:
    """The learning rate [] at training step `step` [], from a schedule or a constant."""
    return learning_rate(step) if callable(learning_rate) else jnp.asarray(learning_rate)


def descend(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, learning_rate: Array
) -> tuple[Any, Any]:
    """One step of `optimizer`: p - learning_rate * direction.

    Every operation is element-wise, so it also updates trees that are stacked over clients.

    Returns:
      The new parameters and the new optimizer state.
    """
    direction, opt_state = optimizer.update(grads, opt_state, params)
    return jax.tree.map(lambda p, d: p - (learning_rate * d).astype(p.dtype), params, direction), opt_state


def schedule(name: str, base: float, *, epochs: int, steps_per_epoch: int, decay: float = 0.1) -> Schedule:
    """A learning rate that changes from epoch to epoch (Li et al. 2023, section 4).

    Example:
      >>> import jax.numpy as jnp
      >>> lr = schedule("multistep", 1.0, epochs=10, steps_per_epoch=5)
      >>> [round(float(lr(jnp.array(5 * epoch))), 3) for epoch in (0, 5, 6, 8)]
      [1.0, 1.0, 0.1, 0.01]

    Args:
      name: "cosine" (from `base` down to 0), "multistep" (multiplied by `decay` at 60 % and at 80 % of the
        epochs; the paper uses 0.2 for the clients) or "constant".
      base: Learning rate of the first epoch.
      epochs: Length of the run.
      steps_per_epoch: Training steps in an epoch.
      decay: Factor of "multistep".

    Raises:
      ValueError: If there is no schedule of this name.
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
