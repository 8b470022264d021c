"""Momentum contrast: the momentum encoder, the queue of keys and the InfoNCE loss (He et al., CVPR 2020)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class MomentumContrast(NamedTuple):
    """The settings of momentum contrast. The defaults are those of Li et al. 2023."""

    queue_size: int = 6000  # K, at least the keys of a step
    temperature: float = 0.1  # T of InfoNCE
    momentum: float = 0.99  # tau of the momentum models, client-side and server-side
    symmetric: bool = True  # the symmetric loss of MoCo V2: the key views are contrasted as queries too
    # In place of it: clients run both models on both views, the loss is the mean over all 2 M B rows, and clients
    # get gradients for both views (MonAcoSFL, Przewięźlikowski et al. 2024). MocoSFL only.
    full_symmetric: bool = False
    feature_sharing: bool = True  # one queue for all clients; else each has one of K // N keys. MocoSFL only

    @property
    def views(self) -> int:
        """Views of an image that give keys in a step."""
        return 2 if self.symmetric or self.full_symmetric else 1


class MoCoQueue(NamedTuple):
    """A ring buffer of the K newest keys. Queues per client have a leading client axis."""

    keys: Array  # [K, D], unit rows
    cursor: Array  # [] int32, the row to overwrite next: the oldest key


def init_queue(rng: Array, size: int, key_dim: int) -> MoCoQueue:
    """K = `size` normalised Gaussian rows of width `key_dim`."""
    return MoCoQueue(normalise(jax.random.normal(rng, (size, key_dim))), jnp.zeros((), jnp.int32))


def init_queues(rng: Array, num_clients: int, size: int, key_dim: int) -> MoCoQueue:
    """A queue of `size` keys for each of N clients: keys [N, size, D], cursors [N]."""
    return jax.vmap(lambda rng: init_queue(rng, size, key_dim))(jax.random.split(rng, num_clients))


def enqueue(queue: MoCoQueue, keys: Array, real: Array | None = None) -> MoCoQueue:
    """Replace the oldest keys by `keys` [n, D], wrapping around at the end.

    Args:
      queue: the queue.
      keys: [n, D], the oldest first.
      real: [n] bool, which rows of `keys` to take; None: all of them.

    Raises:
      ValueError: if n > K.
    """
    size = queue.keys.shape[0]
    if keys.shape[0] > size:
        raise ValueError(f"a queue of {size} keys cannot take {keys.shape[0]} at once")
    if real is None:
        real = jnp.ones(keys.shape[0], bool)
    place = jnp.cumsum(real, dtype=jnp.int32) - 1
    rows = jnp.where(real, (queue.cursor + place) % size, size)  # a row beyond the end is dropped
    cursor = (queue.cursor + jnp.sum(real, dtype=jnp.int32)) % size
    return MoCoQueue(queue.keys.at[rows].set(keys, mode="drop"), cursor)


def similarities(queue: MoCoQueue, query: Array) -> Array:
    """Cosine similarities [n, K] of `query` [n, D] and the keys of the queue, all unit rows."""
    # Full precision: accelerators would round the factors, and 1 / T multiplies the error.
    return jnp.matmul(query, queue.keys.T, precision=jax.lax.Precision.HIGHEST)


class QueueAccess(NamedTuple):
    """How the rows of a batch meet the keys that are remembered."""

    similarities: Callable[[MoCoQueue, Array], Array]  # queue, queries [n, D] -> [n, K]
    enqueue: Callable[[MoCoQueue, Array], MoCoQueue]  # queue, keys [n, D] -> queue


SHARED = QueueAccess(similarities, enqueue)  # feature sharing: one queue for all clients


def per_client(
    select: Callable[[MoCoQueue], MoCoQueue],
    put_back: Callable[[MoCoQueue, MoCoQueue], MoCoQueue],
    split: Callable[[Array], Array],
    merge: Callable[[Array], Array],
    real: np.ndarray,
) -> QueueAccess:
    """Feature sharing off: every client is contrasted with its own keys only.

    Args:
      select: queues of the pool [N, K, D] -> those of the cohort [M, K, D].
      put_back: the pool's with the cohort's in their places.
      split: rows of the batch [n, ...] as [M, B, ...].
      merge: and back.
      real: [M, B] bool, which of these rows there are.

    Returns:
      Access to queues [N, K, D] with cursors [N].
    """

    def similarities_(queues: MoCoQueue, query: Array) -> Array:
        return merge(jax.vmap(similarities)(select(queues), split(query)))

    def enqueue_(queues: MoCoQueue, keys: Array) -> MoCoQueue:
        return put_back(queues, jax.vmap(enqueue)(select(queues), split(keys), jnp.asarray(real)))

    return QueueAccess(similarities_, enqueue_)


def normalise(x: Array) -> Array:
    """Rows of `x` [..., D] scaled to length 1; a zero row stays zero.

    x / max(||x||, 1e-12), written so that the gradient of a zero row is finite.
    """
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def info_nce(query: Array, key: Array, negatives: Array, temperature: float) -> tuple[Array, Array]:
    """InfoNCE of queries against their positive keys and the negatives (He et al. 2020, eq. 1).

    Args:
      query: [n, D], unit rows.
      key: [n, D], unit rows; row i is the positive of query i.
      negatives: [n, K], similarities of each query and its negatives.
      temperature: T.

    Returns:
      The loss, a mean over the n queries, and the share of queries whose positive has the largest
      logit of all (contrastive accuracy), both [].
    """
    # Positive and negatives are not concatenated: the negatives may be spread over devices.
    positive, negatives = jnp.sum(query * key, axis=-1) / temperature, negatives / temperature
    hardest = jnp.max(negatives, axis=1)
    largest = jax.lax.stop_gradient(jnp.maximum(positive, hardest))
    others = jnp.sum(jnp.exp(negatives - largest[:, None]), axis=1)
    losses = largest - positive + jnp.log(jnp.exp(positive - largest) + others)
    return jnp.mean(losses), jnp.mean(positive >= hardest)


def momentum_update(key_params: Any, params: Any, momentum: float) -> Any:
    """tau * key_params + (1 - tau) * params, leaf by leaf (He et al. 2020, eq. 2)."""
    return jax.tree.map(lambda k, p: momentum * k + (1 - momentum) * p, key_params, params)
