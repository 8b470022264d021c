"""Averaging of the client-side models (McMahan et al. 2017) and how far apart they are.

Trees are stacked: every leaf has a leading client axis.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def average(stacked: Any, weights: Array | None = None) -> Any:
    """Mean over the client axis of every leaf [M, ...], weighted by `weights` [M] if given."""
    if weights is None:
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), stacked)
    shares = weights / jnp.sum(weights)
    return jax.tree.map(lambda leaf: jnp.tensordot(shares.astype(leaf.dtype), leaf, axes=1), stacked)


def broadcast(params: Any, num_clients: int) -> Any:
    """One model's `params` loaded into `num_clients` clients: every leaf becomes [N, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_clients, *leaf.shape)), params)


def divergence(stacked: Any, mean: Any) -> Array:
    """How far each client's model [M, ...] is from `mean`: [M].

    The sum over the parameter tensors of the L2 norm of the difference, as the official code has it.
    """

    def distance(params: Any) -> Array:
        norms = jax.tree.map(lambda a, b: jnp.sqrt(jnp.sum(jnp.square(a - b))), params, mean)
        return sum(jax.tree.leaves(norms), jnp.zeros(()))

    return jax.vmap(distance)(stacked)


def divergence_aware(
    stacked: Any, mean: Any, divergences: Array, scales: Array, strength: float
) -> tuple[Any, Array]:
    """Divergence-aware averaging (Zhuang et al., ICLR 2022): who is far from the mean keeps more of its own.

    mu = min(lambda * divergence, 1); a client's model becomes mu * its own + (1 - mu) * the mean. lambda is
    `strength` the first time, and from then on what makes the same divergence give the same mu.

    Args:
      stacked: the clients' models, leaves [M, ...].
      mean: their average.
      divergences: [M], of `divergence`.
      scales: [M], each client's lambda; 0 before its first synchronization.
      strength: the first lambda.

    Returns:
      The new models and scales.
    """
    mu = jnp.minimum(jnp.where(scales > 0, scales, strength) * divergences, 1.0)
    first = jnp.where(divergences > 0, mu / jnp.where(divergences > 0, divergences, 1.0), 0.0)

    def blend(leaf: Array, centre: Array) -> Array:
        share = mu.astype(leaf.dtype).reshape(-1, *[1] * centre.ndim)
        return share * leaf + (1 - share) * centre[None]

    return jax.tree.map(blend, stacked, mean), jnp.where(scales > 0, scales, first)
