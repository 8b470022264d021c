"""Vector concatenation: the rows of a cohort's clients as one batch, and back (Li et al. 2023).

Clients with small batches are padded to [M, B, ...], and `real` marks the rows that are not padding. The
concatenated batch contains no padding, so nothing computed from it can depend on the padding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array


def real_rows(batch_sizes: Sequence[int]) -> np.ndarray:
    """The rows that hold images, [M, B] bool, where B is the largest of `batch_sizes` [M].

    Example:
      >>> real_rows([2, 1]).tolist()
      [[True, True], [True, False]]
    """
    return np.arange(max(batch_sizes)) < np.asarray(batch_sizes)[:, None]


def merge(x: Array, real: np.ndarray | None = None) -> Array:
    """Concatenate `x` [M, B, ...] to one batch [n, ...], client by client; only `real` rows, if given."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat if real is None else flat[np.flatnonzero(real)]


def split(x: Array, shape: tuple[int, int], real: np.ndarray | None = None) -> Array:
    """Split the batch `x` [n, ...] into `shape` = (M, B) + [...], with zeros where `real` [M, B] is false."""
    if real is not None:
        padded = jnp.zeros((real.size, *x.shape[1:]), x.dtype)
        x = padded.at[np.flatnonzero(real)].set(x, unique_indices=True)
    return x.reshape(*shape, *x.shape[1:])


def over_views(model: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
    """A model of one batch [n, ...], on several views [views, n, ...], which it gets as one batch."""

    def run(params: Any, views: Array) -> Array:
        rows = model(params, views.reshape(-1, *views.shape[2:]))
        return rows.reshape(*views.shape[:2], *rows.shape[1:])

    return run
