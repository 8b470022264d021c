"""Optimizers of clients and server, and learning-rate schedules over epochs."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax.errors import UserError

SCHEDULES = ("cosine", "multistep", "constant")
Schedule = Callable[[Array], Array]  # training step [] int32 -> learning rate []


def sgd(
    learning_rate: Schedule | float,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    *,
    own_steps: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """SGD as in PyTorch: g += weight_decay * p, then m = momentum * m + g, then p -= learning_rate * m.

    A schedule is over the steps of the run, which `descend` passes as `step`. So a client that sits out an
    epoch still follows the schedule of the whole run. In a loop of your own, call
    `update(grads, state, params, step=step)`.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = sgd(0.5, momentum=0.0, weight_decay=0.0)
      >>> params, _ = descend(optimizer, jnp.ones(1), optimizer.init(jnp.zeros(1)), jnp.zeros(1), 0)
      >>> params.tolist()
      [-0.5]

    Args:
      learning_rate: A number, or a schedule over training steps.
      momentum: Decay of the buffer m.
      weight_decay: Of all parameters.
      own_steps: Whether the schedule is over the steps that this optimizer has taken, which it then counts in
        its state, instead of those of the run.
    """
    scale = optax.scale_by_learning_rate if own_steps else _scale_by_learning_rate
    return optax.chain(
        optax.add_decayed_weights(weight_decay), optax.trace(decay=momentum), scale(learning_rate)
    )


def _scale_by_learning_rate(learning_rate: Schedule | float) -> optax.GradientTransformationExtraArgs:
    """Like `optax.scale_by_learning_rate`, but without a counter: `update` takes the training step."""

    def update(
        updates: Any, state: Any, params: Any = None, *, step: Array, **others: Any
    ) -> tuple[Any, Any]:
        rate = learning_rate(step) if callable(learning_rate) else jnp.asarray(learning_rate)
        return jax.tree.map(lambda direction: -(rate * direction).astype(direction.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def adam(learning_rate: Schedule | float) -> optax.GradientTransformationExtraArgs:
    """Adam with PyTorch's defaults (Kingma and Ba 2015), and a schedule as for `sgd`.

    Example:
      >>> import jax.numpy as jnp
      >>> optimizer = adam(0.5)
      >>> params, _ = descend(optimizer, jnp.ones(1), optimizer.init(jnp.zeros(1)), jnp.zeros(1), 0)
      >>> params.round(3).tolist()
      [-0.5]

    Args:
      learning_rate: A number, or a schedule over training steps.
    """
    return optax.chain(optax.scale_by_adam(), _scale_by_learning_rate(learning_rate))


SGD = sgd(0.06)  # the paper's rate, without a schedule


def check(argument: str, optimizer: Any) -> None:
    """Raise UserError if what was given as `argument` is no Optax optimizer."""
    if not isinstance(optimizer, optax.GradientTransformation):
        found = getattr(optimizer, "__name__", repr(optimizer))
        raise UserError(f"{argument}: found {found}, allowed: an Optax optimizer, such as optax.adam(1e-3)")


def descend(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any, step: Array | int
) -> tuple[Any, Any]:
    """One step of any Optax optimizer.

    Args:
      optimizer: Its update receives `step` if it takes extra arguments, as `sgd` does. Others count for
        themselves.
      grads: Gradients of `params`.
      opt_state: State of the optimizer.
      params: Parameters of one model.
      step: [], training step of the run.

    Returns:
      The new parameters and the new optimizer state.
    """
    update = optax.with_extra_args_support(optimizer).update
    updates, opt_state = update(grads, opt_state, params, step=step)
    return optax.apply_updates(params, updates), opt_state


def schedule(
    name: str,
    base: float,
    *,
    epochs: int,
    steps_per_epoch: int,
    decay: float = 0.1,
    milestones: Sequence[float] = (0.6, 0.8),
) -> Callable[[Array | int], Array]:
    """A learning rate that changes from epoch to epoch (Li et al. 2023, section 4).

    Example:
      >>> import jax.numpy as jnp
      >>> lr = schedule("multistep", 1.0, epochs=10, steps_per_epoch=5)
      >>> [round(float(lr(jnp.array(5 * epoch))), 3) for epoch in (0, 5, 6, 8)]
      [1.0, 1.0, 0.1, 0.01]

    Args:
      name: "cosine" (from `base` down to 0), "multistep" (multiplied by `decay` at each milestone; the paper
        uses 0.2 for the clients) or "constant".
      base: Learning rate of the first epoch.
      epochs: Length of the run.
      steps_per_epoch: Training steps in an epoch.
      decay: Factor of "multistep".
      milestones: Of "multistep", as shares of the epochs.

    Raises:
      ValueError: If there is no schedule of this name.
    """

    if name not in SCHEDULES:
        raise ValueError(f"schedule: found {name!r}, allowed: {', '.join(SCHEDULES)}")

    def at(step: Array | int) -> Array:
        epoch = jnp.asarray(step) // steps_per_epoch
        if name == "cosine":
            return base * 0.5 * (1 + jnp.cos(jnp.pi * epoch / epochs))
        if name == "multistep":
            drops = sum((epoch >= int(share * epochs)).astype(int) for share in milestones)
            return base * jnp.power(decay, drops)
        return jnp.full(jnp.shape(step), base)

    return at
