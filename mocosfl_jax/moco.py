"""Momentum contrast: the momentum encoder, the queue of keys and the InfoNCE loss (He et al., CVPR 2020)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class MoCoQueue(NamedTuple):
    """A ring buffer of the K newest keys."""

    keys: Array  # [K, D], unit rows
    cursor: Array  # [] int32, the row to overwrite next: the oldest key


def init_queue(rng: Array, size: int, key_dim: int) -> MoCoQueue:
    """K = `size` normalised Gaussian rows of width `key_dim`."""
    return MoCoQueue(normalise(jax.random.normal(rng, (size, key_dim))), jnp.zeros((), jnp.int32))


def enqueue(queue: MoCoQueue, keys: Array) -> MoCoQueue:
    """Replace the oldest keys by `keys` [n, D], wrapping around at the end.

    Raises:
      ValueError: if n > K.
    """
    size = queue.keys.shape[0]
    if keys.shape[0] > size:
        raise ValueError(f"a queue of {size} keys cannot take {keys.shape[0]} at once")
    rows = (queue.cursor + jnp.arange(keys.shape[0], dtype=jnp.int32)) % size
    cursor = (queue.cursor + keys.shape[0]) % size
    return MoCoQueue(queue.keys.at[rows].set(keys, unique_indices=True), cursor)


def normalise(x: Array) -> Array:
    """Rows of `x` [n, D] scaled to length 1; a zero row stays zero.

    x / max(||x||, 1e-12), written so that the gradient of a zero row is finite.
    """
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def info_nce(query: Array, key: Array, queue: MoCoQueue, temperature: float) -> tuple[Array, Array]:
    """InfoNCE of queries against their positive keys and the queue's negatives (He et al. 2020, eq. 1).

    Args:
      query: [n, D], unit rows.
      key: [n, D], unit rows; row i is the positive of query i.
      queue: the negatives.
      temperature: T.

    Returns:
      The loss, a mean over the n queries, and the share of queries whose positive has the largest
      logit of all (contrastive accuracy), both [].
    """
    positive = jnp.sum(query * key, axis=-1, keepdims=True)
    # Full precision: accelerators would round the factors, and 1 / T multiplies the error.
    negatives = jnp.matmul(query, queue.keys.T, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.concatenate([positive, negatives], axis=1) / temperature
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[:, 0])
    return loss, jnp.mean(jnp.argmax(logits, axis=1) == 0)


def momentum_update(key_params: Any, params: Any, momentum: float) -> Any:
    """tau * key_params + (1 - tau) * params, leaf by leaf (He et al. 2020, eq. 2)."""
    return jax.tree.map(lambda k, p: momentum * k + (1 - momentum) * p, key_params, params)
