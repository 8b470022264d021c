"""The client side: the models of a cohort, stacked along a leading axis and run as one batched operation.

Smashed data leaves the clients and its gradient comes back. Nothing else passes between them and the server,
and neither module imports the other.
"""

from collections.abc import Callable
from functools import partial
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
    """The state of stacked clients: every leaf has a leading axis, M for a cohort and N for the pool."""

    params: Any
    key_params: Any  # parameters of the momentum models
    opt_state: Any
    # [M], lambda of divergence-aware averaging, 0 before a client's first average; None if it is not used
    scales: Any
    queue: Any  # `MoCoQueue` with keys [M, K, D], the clients' own queues; None under feature sharing


class Pool(NamedTuple):
    """The N clients while none of them trains.

    A synchronization gives all clients the same online model, so the pool keeps it once. The same holds for
    momentum models and SGD buffers where they are synchronized too.
    """

    own: ClientState  # what each client has of its own: leaves [N, ...]; None for what all clients share
    shared: ClientState  # what all clients share: leaves without a client axis; None for what is their own


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
    if not jax.tree.leaves(state.params):  # clients without layers
        return state
    descend = jax.vmap(partial(optim.descend, optimizer), in_axes=(0, 0, 0, None))
    params, opt_state = descend(pullback(smashed_grad), state.opt_state, state.params, learning_rate)
    return state._replace(params=params, opt_state=opt_state)


def synchronize(state: ClientState, weights: Array | None, how: Sync) -> tuple[ClientState, Any, Array]:
    """FedAvg: average the models of the cohort and load the mean into its clients (McMahan et al. 2017).

    Args:
      state: Of the cohort, leaves [M, ...].
      weights: [M], weight of each client in the average; None for equal weights.
      how: What else is averaged. Its weights, of the whole pool, are not used.

    Returns:
      The new state, the mean of the online models, and the distance of each client from the mean, [M].
    """

    def mean_for_all(stacked: Any) -> Any:
        return fedavg.load(fedavg.average(stacked, weights), stacked)

    mean = fedavg.average(state.params, weights)
    divergences = fedavg.divergence(state.params, mean)
    new = state._replace(params=fedavg.load(mean, state.params))
    if how.divergence_lambda is not None:
        params, scales = fedavg.divergence_aware(
            state.params, mean, divergences, state.scales, how.divergence_lambda
        )
        new = new._replace(params=params, scales=scales)
    if how.momentum_models:
        new = new._replace(key_params=mean_for_all(state.key_params))
    if how.buffers == "reset":
        new = new._replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))
    elif how.buffers == "average":
        new = new._replace(opt_state=mean_for_all(state.opt_state))
    return new, mean, divergences
