"""Averages of the client-side models (McMahan et al. 2017), and their distance from the average.

The trees are stacked: every leaf has a leading client axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def average(stacked: Any, weights: Array | None = None) -> Any:
    """The mean of every leaf [N, ...] over the client axis, weighted by `weights` [N] if given.

    Example:
      >>> import jax.numpy as jnp
      >>> stacked = {"kernel": jnp.array([[0.0, 1.0], [4.0, 5.0]])}  # two clients
      >>> average(stacked, weights=jnp.array([3.0, 1.0]))["kernel"].tolist()
      [1.0, 2.0]
    """
    if weights is None:
        return jax.tree.map(lambda leaf: _like(leaf, jnp.mean(leaf, axis=0)), stacked)
    shares = weights / jnp.sum(weights)
    return jax.tree.map(lambda leaf: _like(leaf, jnp.sum(_each(shares, leaf) * leaf, axis=0)), stacked)


def _like(leaf: Array, mean: Array) -> Array:
    """`mean` in the dtype of `leaf`. Whole numbers, such as the steps that Adam counts, are rounded."""
    if leaf.dtype == jnp.bool_:  # what most clients say
        return mean if mean.dtype == jnp.bool_ else mean >= 0.5
    whole = jnp.issubdtype(leaf.dtype, jnp.integer)
    return (jnp.round(mean) if whole else mean).astype(leaf.dtype)


def _each(per_client: Array, leaf: Array) -> Array:
    """`per_client` [N], reshaped to multiply `leaf` [N, ...]."""
    dtype = jnp.result_type(leaf.dtype, jnp.float32)
    return per_client.astype(dtype).reshape(-1, *[1] * (leaf.ndim - 1))


def broadcast(params: Any, num_clients: int) -> Any:
    """Give `num_clients` clients the `params` of one model: every leaf becomes [N, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_clients, *leaf.shape)), params)


def load(mean: Any, stacked: Any) -> Any:
    """The clients `stacked` after each has received the `mean`: every leaf keeps its shape [N, ...]."""
    return jax.tree.map(lambda m, leaf: jnp.broadcast_to(_like(leaf, m), leaf.shape), mean, stacked)


def divergence(stacked: Any, mean: Any) -> Array:
    """The distance [N] of each client's model [N, ...] from `mean`.

    It is the sum over the parameter tensors of the L2 norm of the difference, as in the official code.
    """

    def distance(params: Any) -> Array:
        norms = jax.tree.map(lambda a, b: jnp.sqrt(jnp.sum(jnp.square(a - b))), params, mean)
        return sum(jax.tree.leaves(norms), jnp.zeros(()))

    return jax.vmap(distance)(stacked)


def divergence_aware(
    stacked: Any, mean: Any, divergences: Array, scales: Array, strength: float
) -> tuple[Any, Array]:
    """Divergence-aware averaging (Zhuang et al., ICLR 2022): distant clients keep more of their own model.

    A client's model becomes mu * its own + (1 - mu) * the mean, with mu = min(lambda * divergence, 1). lambda
    is `strength` at the client's first synchronization. That synchronization fixes the client's lambda for
    all later ones, so that an equal divergence gives an equal mu.

    Args:
      stacked: The clients' models, leaves [N, ...].
      mean: Their average.
      divergences: [N], from `divergence`.
      scales: [N], each client's lambda; 0 before its first synchronization.
      strength: The first lambda.

    Returns:
      The new models and the new scales.
    """
    mu = jnp.minimum(jnp.where(scales > 0, scales, strength) * divergences, 1.0)
    first = jnp.where(divergences > 0, mu / jnp.where(divergences > 0, divergences, 1.0), 0.0)

    def blend(leaf: Array, centre: Array) -> Array:
        share = _each(mu, leaf)
        return share * leaf + (1 - share) * centre[None]

    return jax.tree.map(blend, stacked, mean), jnp.where(scales > 0, scales, first)
