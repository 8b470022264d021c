"""The client side: N models stacked along a leading axis and run as one batched operation.

Smashed data leaves the clients and its gradient comes back. Nothing else passes between them and the server,
and neither module imports the other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mocosfl_jax.algorithm import fedavg, optim
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.moco import momentum_update

# The client-side models of a cohort: params [M, ...], images [M, B, H, W, 3] -> smashed data [M, B, h, w, c]
CohortModel = Callable[[Any, Array], Array]
Pullback = Callable[[Array], Any]  # gradient of smashed queries [M, B, h, w, c] -> gradient of params
Stacked = TypeVar("Stacked")  # a tree whose leaves have a leading client axis


class ClientState(NamedTuple):
    """The state of stacked clients. Every leaf has a leading axis: N for the pool, M for a cohort."""

    params: Any
    key_params: Any  # parameters of the momentum models
    opt_state: Any
    scales: Array  # [N], lambda of divergence-aware averaging; 0 before a client's first average


class Sync(NamedTuple):
    """How the clients are synchronized. The default is the paper's: plain FedAvg of the online models."""

    weights: np.ndarray | None = None  # [N], weight of each client in the average; None for equal weights
    momentum_models: bool = (
        False  # also average the momentum models: MonAcoSFL (Przewięźlikowski et al. 2024)
    )
    buffers: str = "keep"  # what happens to the SGD buffers: "keep", "reset" or "average"
    divergence_lambda: float | None = (
        None  # first lambda of divergence-aware averaging; None for plain FedAvg
    )


FEDAVG = Sync()


def init(params: Any, num_clients: int, optimizer: optax.GradientTransformation) -> ClientState:
    """Give all clients the same `params` (of one client); the momentum models start as copies.

    Args:
      params: Parameters of one client-side model.
      num_clients: N.
      optimizer: Without a learning rate, as `optim.sgd` makes it.
    """

    def stack(leaf: Array) -> Array:
        return jnp.repeat(leaf[None], num_clients, axis=0)

    stacked = jax.tree.map(stack, params)
    # Stacked a second time, since donation forbids two leaves that share a buffer.
    key_params = jax.tree.map(stack, params)
    return ClientState(stacked, key_params, optimizer.init(stacked), jnp.zeros(num_clients))


def select(pool: Stacked, cohort: Array | None) -> Stacked:
    """The rows of `pool` [N, ...] that belong to the clients in `cohort` [M]; None selects all, in order."""
    return pool if cohort is None else jax.tree.map(lambda leaf: leaf[cohort], pool)


def put_back(pool: Stacked, members: Stacked, cohort: Array | None) -> Stacked:
    """`pool` [N, ...] with the rows of the clients in `cohort` [M] replaced by `members` [M, ...]."""
    if cohort is None:
        return members
    return jax.tree.map(lambda leaf, new: leaf.at[cohort].set(new, unique_indices=True), pool, members)


def forward(
    cohort_model: CohortModel, state: ClientState, views: Views, momentum: float
) -> tuple[ClientState, SmashedData, Pullback]:
    """Run every client's online model on its query views, and its momentum model on its key views.

    The momentum models are updated after the online forward pass and before their own.

    Args:
      cohort_model: The client-side model, over stacked clients.
      state: Of the cohort, leaves [M, ...].
      views: [M, B, H, W, 3] each.
      momentum: tau of the momentum models.

    Returns:
      The state with new momentum models, the smashed data [M, B, h, w, c], and the pullback that maps the
      gradient of the smashed queries to the gradient of the parameters.
    """
    query, pullback = jax.vjp(lambda params: cohort_model(params, views.query), state.params)
    key_params = momentum_update(state.key_params, state.params, momentum)
    key = cohort_model(key_params, views.key)
    return state._replace(key_params=key_params), SmashedData(query, key), lambda grad: pullback(grad)[0]


def backward(
    state: ClientState,
    pullback: Pullback,
    smashed_grad: Array,
    optimizer: optax.GradientTransformation,
    learning_rate: Array,
) -> ClientState:
    """Run every client's backward pass from its rows of `smashed_grad` [M, B, h, w, c], and update it."""
    params, opt_state = optim.descend(
        optimizer, pullback(smashed_grad), state.opt_state, state.params, learning_rate
    )
    return state._replace(params=params, opt_state=opt_state)


def synchronize(pool: ClientState, cohort: Array | None, how: Sync) -> tuple[ClientState, Array]:
    """FedAvg: average the models of the cohort and load the mean into all clients (McMahan et al. 2017).

    The mean is a weighted sum over the pool in which only the cohort has weight, so over several devices no
    client's model leaves its device.

    Args:
      pool: All clients, leaves [N, ...].
      cohort: [M], the clients to average; None for all.
      how: The weights, and what else is averaged.

    Returns:
      The new pool, and the distance of each client of the cohort from the mean, [M].
    """
    num_clients = len(pool.scales)
    weights = None if how.weights is None else jnp.asarray(how.weights)
    taking_part = jnp.ones(num_clients, bool)
    if cohort is not None:
        taking_part = jnp.zeros(num_clients, bool).at[cohort].set(True)
        weights = taking_part * (1.0 if weights is None else weights)

    def mean_for_all(stacked: Any) -> Any:
        return fedavg.broadcast(fedavg.average(stacked, weights), num_clients)

    mean = fedavg.average(pool.params, weights)
    divergences = fedavg.divergence(pool.params, mean)
    new = pool._replace(params=fedavg.broadcast(mean, num_clients))
    if how.divergence_lambda is not None:
        params, scales = fedavg.divergence_aware(
            pool.params, mean, divergences, pool.scales, how.divergence_lambda, taking_part
        )
        new = new._replace(params=params, scales=scales)
    if how.momentum_models:
        new = new._replace(key_params=mean_for_all(pool.key_params))
    if how.buffers == "reset":
        new = new._replace(opt_state=jax.tree.map(jnp.zeros_like, pool.opt_state))
    elif how.buffers == "average":
        new = new._replace(opt_state=mean_for_all(pool.opt_state))
    return new, divergences if cohort is None else divergences[cohort]
