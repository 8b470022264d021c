"""Averaging of the client-side models (McMahan et al. 2017) and how far apart they are.

Trees are stacked: every leaf has a leading client axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def average(stacked: Any, weights: Array | None = None) -> Any:
    """Mean over the client axis of every leaf [N, ...], weighted by `weights` [N] if given."""
    if weights is None:
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), stacked)
    shares = weights / jnp.sum(weights)
    return jax.tree.map(lambda leaf: jnp.sum(_each(shares, leaf) * leaf, axis=0), stacked)


def _each(per_client: Array, leaf: Array) -> Array:
    """`per_client` [N] as a factor of `leaf` [N, ...]."""
    return per_client.astype(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))


def broadcast(params: Any, num_clients: int) -> Any:
    """One model's `params` loaded into `num_clients` clients: every leaf becomes [N, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_clients, *leaf.shape)), params)


def divergence(stacked: Any, mean: Any) -> Array:
    """How far each client's model [N, ...] is from `mean`: [N].

    The sum over the parameter tensors of the L2 norm of the difference, as the official code has it.
    """

    def distance(params: Any) -> Array:
        norms = jax.tree.map(lambda a, b: jnp.sqrt(jnp.sum(jnp.square(a - b))), params, mean)
        return sum(jax.tree.leaves(norms), jnp.zeros(()))

    return jax.vmap(distance)(stacked)


def divergence_aware(
    stacked: Any, mean: Any, divergences: Array, scales: Array, strength: float, taking_part: Array
) -> tuple[Any, Array]:
    """Divergence-aware averaging (Zhuang et al., ICLR 2022): who is far from the mean keeps more of its own.

    mu = min(lambda * divergence, 1); a client's model becomes mu * its own + (1 - mu) * the mean. lambda is
    `strength` the first time, and from then on what makes the same divergence give the same mu. Who does not
    take part gets the mean, and keeps its lambda.

    Args:
      stacked: the clients' models, leaves [N, ...].
      mean: their average.
      divergences: [N], of `divergence`.
      scales: [N], each client's lambda; 0 before its first synchronization.
      strength: the first lambda.
      taking_part: [N] bool.

    Returns:
      The new models and scales.
    """
    mu = jnp.minimum(jnp.where(scales > 0, scales, strength) * divergences, 1.0)
    mu = jnp.where(taking_part, mu, 0.0)
    first = jnp.where(divergences > 0, mu / jnp.where(divergences > 0, divergences, 1.0), 0.0)

    def blend(leaf: Array, centre: Array) -> Array:
        share = _each(mu, leaf)
        return share * leaf + (1 - share) * centre[None]

    return jax.tree.map(blend, stacked, mean), jnp.where(scales > 0, scales, first)
