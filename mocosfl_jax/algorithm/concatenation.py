"""Vector concatenation: the rows of a cohort's clients as one batch, and back (Li et al. 2023).

Clients with smaller batches than others are padded to [M, B, ...]; `real` says which rows are theirs. The
padding never gets into the concatenated batch, so nothing that is computed from it can depend on it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array


def real_rows(batch_sizes: Sequence[int]) -> np.ndarray:
    """Which of a cohort's padded rows hold images: [M, B] bool, B the largest of `batch_sizes` [M]."""
    return np.arange(max(batch_sizes)) < np.asarray(batch_sizes)[:, None]


def merge(x: Array, real: np.ndarray | None = None) -> Array:
    """`x` [M, B, ...] as one batch [n, ...], client by client; only the rows in `real` [M, B], if given."""
    flat = x.reshape(-1, *x.shape[2:])
    return flat if real is None else flat[np.flatnonzero(real)]


def split(x: Array, shape: tuple[int, int], real: np.ndarray | None = None) -> Array:
    """The batch `x` [n, ...] as `shape` + [...], each client its rows; zeros where `real` [M, B] is false."""
    if real is not None:
        padded = jnp.zeros((real.size, *x.shape[1:]), x.dtype)
        x = padded.at[np.flatnonzero(real)].set(x, unique_indices=True)
    return x.reshape(*shape, *x.shape[1:])
