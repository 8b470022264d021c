"""Synchronization of the client-side models (McMahan et al. 2017)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def average(stacked: Any, cohort: Array | None = None) -> Any:
    """Mean over the client axis of every leaf [N, ...], of the clients in `cohort` [M]; None: of all."""
    members = stacked if cohort is None else jax.tree.map(lambda leaf: leaf[cohort], stacked)
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), members)


def broadcast(params: Any, num_clients: int) -> Any:
    """One model's `params` loaded into `num_clients` clients: every leaf becomes [N, ...]."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (num_clients, *leaf.shape)), params)
