"""Momentum contrast: the momentum encoder, the queue of keys and the InfoNCE loss (He et al., CVPR 2020)."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mocosfl_jax.errors import UserError


class MomentumContrast(NamedTuple):
    """The settings of momentum contrast. The defaults are those of Li et al. 2023."""

    queue_size: int = 6000  # K, at least the keys of one view; 0 for a contrast that needs no queue
    temperature: float = 0.1  # T of InfoNCE
    momentum: float = 0.99  # tau of the momentum models, on both sides of the cut
    symmetric: bool = True  # the symmetric loss of MoCo V2: the key views also serve as queries
    # Replaces the symmetric loss. Clients run both models on both views, the loss is the mean over all 2 M B
    # rows, and clients receive gradients for both views (MonAcoSFL, Przewięźlikowski et al. 2024). Not in
    # FL-MoCo.
    full_symmetric: bool = False
    # One queue for all clients. Without it each client has a queue of K // N keys. Not in FL-MoCo.
    feature_sharing: bool = True
    # Vector concatenation: the rows of the cohort are one batch of the server. Without it the rows of each
    # client are a step of the server by themselves. Not in FL-MoCo.
    concatenate: bool = True


def check(moco: MomentumContrast) -> None:
    """Raise ValueError for impossible settings."""
    if not 0 < moco.temperature < np.inf:
        raise ValueError(f"moco.temperature: found {moco.temperature}, allowed: more than 0")
    if not 0 <= moco.momentum <= 1:
        raise ValueError(f"moco.momentum: found {moco.momentum}, allowed: 0 to 1")
    if moco.queue_size < 0:
        raise ValueError(f"moco.queue_size: found {moco.queue_size}, allowed: 0 or more")


class MoCoQueue(NamedTuple):
    """A ring buffer of the K newest keys. Queues per client have a leading client axis."""

    keys: Array  # [K, D], unit rows
    cursor: Array  # [] int32, the row of the oldest key, which is overwritten next


def init_queue(rng: Array, size: int, key_dim: int) -> MoCoQueue:
    """A queue of K = `size` normalised Gaussian rows of width `key_dim`."""
    return MoCoQueue(normalise(jax.random.normal(rng, (size, key_dim))), jnp.zeros((), jnp.int32))


def init_queues(rng: Array, num_clients: int, size: int, key_dim: int) -> MoCoQueue:
    """One queue of `size` keys for each of N clients: keys [N, size, D], cursors [N]."""
    return jax.vmap(lambda rng: init_queue(rng, size, key_dim))(jax.random.split(rng, num_clients))


def enqueue(queue: MoCoQueue, keys: Array, real: Array | None = None) -> MoCoQueue:
    """Replace the oldest keys by `keys` [n, D], wrapping around at the end.

    Example:
      >>> import jax.numpy as jnp
      >>> queue = MoCoQueue(keys=jnp.zeros((3, 1)), cursor=jnp.array(2))
      >>> queue = enqueue(queue, jnp.array([[1.0], [2.0]]))
      >>> queue.keys[:, 0].tolist(), int(queue.cursor)
      ([2.0, 0.0, 1.0], 1)

    Args:
      queue: The queue.
      keys: [n, D], oldest first.
      real: [n] bool, the rows of `keys` to take; None for all of them.

    Raises:
      ValueError: If n > K.
    """
    size = queue.keys.shape[0]
    if keys.shape[0] > size:
        raise UserError(f"moco.queue_size: found a queue of {size} keys, allowed: {keys.shape[0]} or more")
    if real is None:
        real = jnp.ones(keys.shape[0], bool)
    place = jnp.cumsum(real, dtype=jnp.int32) - 1
    rows = jnp.where(real, (queue.cursor + place) % size, size)  # rows beyond the end are dropped
    cursor = (queue.cursor + jnp.sum(real, dtype=jnp.int32)) % size
    return MoCoQueue(queue.keys.at[rows].set(keys, mode="drop"), cursor)


def similarities(queue: MoCoQueue, query: Array) -> Array:
    """Cosine similarities [n, K] of `query` [n, D] and the keys of the queue; all rows have unit length."""
    # Full precision, since accelerators would round the factors and 1 / T multiplies the error.
    return jnp.matmul(query, queue.keys.T, precision=jax.lax.Precision.HIGHEST)


class QueueAccess(NamedTuple):
    """How the rows of a batch are compared with a queue and added to it."""

    similarities: Callable[[MoCoQueue, Array], Array]  # queue, queries [n, D] -> [n, K]
    # queue, keys [n, D], the rows to take [n] bool or None -> queue
    enqueue: Callable[[MoCoQueue, Array, Array | None], MoCoQueue]


SHARED = QueueAccess(similarities, enqueue)  # feature sharing: one queue for all clients


def per_client(
    split: Callable[[Array], Array], merge: Callable[[Array], Array], real: np.ndarray
) -> QueueAccess:
    """Access without feature sharing: every client is contrasted with its own keys only.

    Args:
      split: Rows of the batch [n, ...] -> [M, B, ...].
      merge: The inverse of `split`.
      real: [M, B] bool, the rows that are not padding.

    Returns:
      Access to the queues of the cohort, with keys [M, K, D] and cursors [M].
    """

    def similarities_(queues: MoCoQueue, query: Array) -> Array:
        return merge(jax.vmap(similarities)(queues, split(query)))

    def enqueue_(queues: MoCoQueue, keys: Array, arrived: Array | None) -> MoCoQueue:
        rows = jnp.asarray(real) if arrived is None else split(arrived)
        return jax.vmap(enqueue)(queues, split(keys), rows)

    return QueueAccess(similarities_, enqueue_)


def normalise(x: Array) -> Array:
    """Scale the rows of `x` [..., D] to length 1; a zero row stays zero.

    This is x / max(||x||, 1e-12), written so that the gradient of a zero row is finite.
    """
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))


def info_nce(
    query: Array, key: Array, negatives: Array, temperature: float, real: Array | None = None
) -> tuple[Array, Array]:
    """InfoNCE of queries against their positive keys and the negatives (He et al. 2020, eq. 1).

    Example:
      >>> import jax.numpy as jnp
      >>> query = key = jnp.array([[1.0, 0.0]])
      >>> loss, top1 = info_nce(query, key, negatives=jnp.array([[0.0]]), temperature=1.0)
      >>> round(float(loss), 4), float(top1)  # log(1 + exp(-1)), and the positive wins
      (0.3133, 1.0)

    Args:
      query: [n, D], unit rows.
      key: [n, D], unit rows; row i is the positive of query i.
      negatives: [n, K], similarities of each query to its negatives.
      temperature: T.
      real: [n] bool, the rows over which both means are taken; None for all of them.

    Returns:
      The loss [], a mean over the queries, and the contrastive accuracy []: the share of queries whose
      positive has the largest logit.
    """
    # Positives and negatives are not concatenated, since the negatives may be sharded over devices.
    positive, negatives = jnp.sum(query * key, axis=-1) / temperature, negatives / temperature
    hardest = jnp.max(negatives, axis=1)
    largest = jax.lax.stop_gradient(jnp.maximum(positive, hardest))
    others = jnp.sum(jnp.exp(negatives - largest[:, None]), axis=1)
    losses = largest - positive + jnp.log(jnp.exp(positive - largest) + others)
    return jnp.mean(losses, where=real), jnp.mean(positive >= hardest, where=real)


class Contrast(NamedTuple):
    """How well the queries pick out their positives."""

    loss: Array  # [], of one direction or the sum of both
    top1: Array  # [], contrastive accuracy; with the symmetric loss, of the second direction


def checked(found: Any) -> Contrast:
    """What a function of your own returned as its contrast.

    Raises:
      UserError: If it is no `Contrast` of two numbers.
    """
    if not isinstance(found, Contrast):
        what = "an array" if isinstance(found, Array) else f"a {type(found).__name__}"
        raise UserError(f"contrast: found a function that returns {what}, allowed: a Contrast(loss, top1)")
    for name, value in found._asdict().items():
        if jnp.shape(value) != ():
            raise UserError(f"contrast: found a {name} of shape {jnp.shape(value)}, allowed: one number")
    return Contrast(*map(jnp.asarray, found))


class ContrastFunction(Protocol):
    """What the server learns from queries and keys. `momentum_contrast` makes MoCo's."""

    def __call__(
        self, params: Any, query: Array, key: Array, similarities: Callable[[Array], Array]
    ) -> Contrast:
        """Compare each query with its key.

        Args:
          params: Of the server's online model, trained by the loss. They may hold more than the network uses,
            such as a predictor.
          query: [n, D], projections by the online model, not normalised.
          key: [n, D], projections of the other view by the momentum model, not normalised; constants.
          similarities: Maps unit rows [n, D] to their cosine similarities [n, K] to the keys in the queue.
            Calling it raises ValueError if there is no queue.

        Returns:
          The loss, and a number between 0 and 1 that is reported as contrastive accuracy.
        """


def momentum_contrast(temperature: float = 0.1, real: Array | None = None) -> ContrastFunction:
    """InfoNCE against the keys in the queue (He et al. 2020, eq. 1).

    Args:
      temperature: T.
      real: [n] bool, the rows over which loss and accuracy are averaged; None for all of them.
    """

    def contrast(params: Any, query: Array, key: Array, similarities: Callable[[Array], Array]) -> Contrast:
        query, key = normalise(query), normalise(key)
        return Contrast(*info_nce(query, key, similarities(query), temperature, real))

    return contrast


def momentum_update(key_params: Any, params: Any, momentum: float) -> Any:
    """tau * key_params + (1 - tau) * params, leaf by leaf (He et al. 2020, eq. 2)."""
    return jax.tree.map(lambda k, p: momentum * k + (1 - momentum) * p, key_params, params)
