"""The client pool: clients enter it from a cohort and leave it for one.

A cohort enters training at the start of its epoch, takes steps, is synchronized, and leaves. Steps neither
read nor write the pool.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mocosfl_jax.algorithm import clients, fedavg
from mocosfl_jax.algorithm.clients import ClientState, Pool, Sync
from mocosfl_jax.algorithm.interface import (
    EVERYWHERE,
    CohortState,
    Models,
    State,
    SyncInfo,
    TrainState,
    of_clients,
)
from mocosfl_jax.algorithm.messages import Views
from mocosfl_jax.algorithm.moco import MoCoQueue
from mocosfl_jax.algorithm.placement import Placement
from mocosfl_jax.errors import UserError


def owned(sync: Sync, *, frozen: bool = False) -> ClientState:
    """For each part of a client's state, whether each client of the pool has its own.

    Args:
      sync: How the clients are synchronized.
      frozen: Whether the clients are never trained. Then they share one momentum model too, which all move
        alike towards the online model; it moves in each epoch, whoever takes part.
    """
    return ClientState(
        params=not frozen and sync.divergence_lambda is not None,
        key_params=not frozen and not sync.momentum_models,
        opt_state=not frozen and sync.buffers == "keep",
        scales=True,
        queue=True,
        anchor=False,
    )


def init(
    params: Any,
    key_params: Any,
    optimizer: optax.GradientTransformation,
    num_clients: int,
    sync: Sync,
    *,
    own: ClientState,
    queues: MoCoQueue | None = None,
) -> Pool:
    """A pool in which all clients have the same models.

    Args:
      params: Parameters of one client-side model.
      key_params: Parameters of its momentum model.
      optimizer: Of one client.
      num_clients: N.
      sync: How the clients are synchronized.
      own: From `owned`.
      queues: A queue for each client, with keys [N, K, D]; None if all clients share the server's.
    """
    one = ClientState(
        params,
        # A copy, since donation forbids two leaves that share a buffer.
        jax.tree.map(jnp.copy, key_params),
        optimizer.init(params),
        scales=None if sync.divergence_lambda is None else jnp.zeros(()),
        queue=None,
    )
    each, shared = _divide(one, own)
    return Pool(fedavg.broadcast(each, num_clients)._replace(queue=queues), shared)


def enter(
    state: TrainState,
    cohort: Array | np.ndarray | Sequence[int] | None = None,
    *,
    num_clients: int,
    placement: Placement,
    anchored: bool = False,
) -> CohortState:
    """The state for the steps of the clients in `cohort` [M]; None stands for all clients, in order.

    Args:
      state: At rest.
      cohort: Numbers of the clients.
      num_clients: N.
      placement: Where the arrays live.
      anchored: Whether clients remember the parameters of the last synchronization.

    Raises:
      ValueError: If a number in `cohort` is not that of a client, or occurs twice, as far as is known.
      TypeError: If another cohort has not left yet.
    """
    _require_at_rest(state)
    if cohort is not None:
        cohort = cohort if isinstance(cohort, Array) else np.asarray(cohort)
        _check_cohort(cohort, num_clients)
        cohort = jnp.asarray(cohort)
    own, shared = state.pool
    members = _combine(
        placement.select(own, cohort),
        fedavg.broadcast(shared, num_clients if cohort is None else len(cohort)),
    )
    if anchored:
        members = members._replace(anchor=jax.tree.map(jnp.copy, members.params))
    return CohortState(state.step, members, state.server, cohort, None if cohort is None else state.pool)


def leave(state: CohortState, *, own: ClientState, placement: Placement) -> TrainState:
    """The state after the cohort has returned to the pool.

    Of what all clients share, the pool takes the mean over the cohort. After a synchronization the members
    hold the same, and the mean is exactly that.

    Args:
      state: The cohort at work.
      own: From `owned`.
      placement: As given to `enter`.

    Raises:
      TypeError: If no cohort has entered.
    """
    require_at_work(state)
    each, equal = _divide(state.clients._replace(anchor=None), own)
    if state.pool is not None:
        each = placement.put_back(state.pool.own, each, state.cohort)
    return TrainState(state.step, Pool(each, jax.tree.map(_mean_of_equals, equal)), state.server)


def synchronize(
    state: CohortState, *, sync: Sync, optimizer: optax.GradientTransformation
) -> tuple[CohortState, SyncInfo]:
    """FedAvg over the cohort, see `clients.synchronize`.

    Where clients keep online models of their own, those that are not in the cohort receive the mean too.

    Raises:
      TypeError: If no cohort has entered.
    """
    require_at_work(state)
    weights = None if sync.weights is None else jnp.asarray(sync.weights)
    if weights is not None and state.cohort is not None:
        weights = weights[state.cohort]
    members, mean, divergence = clients.synchronize(state.clients, weights, sync, optimizer)
    pool = state.pool
    if pool is not None and pool.own.params is not None:
        pool = pool._replace(own=pool.own._replace(params=fedavg.load(mean, pool.own.params)))
    return state._replace(clients=members, pool=pool), SyncInfo(divergence)


def online_model(state: TrainState) -> Any:
    """The online model to evaluate: the one that all clients share, or the first client's.

    Raises:
      TypeError: If a cohort has not left yet.
    """
    _require_at_rest(state)
    if state.pool.own.params is None:
        return state.pool.shared.params
    return jax.tree.map(lambda leaf: leaf[0], state.pool.own.params)


def momentum_model(state: TrainState) -> Any:
    """The momentum model that all clients share, or the mean of theirs."""
    _require_at_rest(state)
    if state.pool.own.key_params is None:
        return state.pool.shared.key_params
    return fedavg.average(state.pool.own.key_params)


def models(state: TrainState) -> Models:
    """The models of a state with client-side models and a server-side model."""
    return Models(
        (online_model(state), state.server.params), (momentum_model(state), state.server.key_params)
    )


def homes(state: State, *, num_clients: int, of_server: Callable[[Any], Any]) -> Any:
    """Where each part of a state lives, see `Algorithm.homes`; `of_server` says it of the server's part."""
    pool = None if state.pool is None else Pool(own=of_clients(num_clients), shared=EVERYWHERE)
    if isinstance(state, TrainState):
        return TrainState(EVERYWHERE, pool, of_server(state.server))
    members = of_clients(num_clients if state.cohort is None else len(state.cohort))
    return CohortState(EVERYWHERE, members, of_server(state.server), EVERYWHERE, pool)


def check(num_clients: int, sync: Sync) -> None:
    """Raise ValueError for a pool that cannot exist, or an impossible synchronization."""
    if num_clients < 1:
        raise ValueError(f"num_clients: found {num_clients}, allowed: 1 or more")
    clients.check(sync, num_clients)


def check_views(state: CohortState, views: Views, num_clients: int) -> None:
    """Raise ValueError unless `views` are two views [M, B, H, W, 3] for the cohort that has entered.

    Raises:
      TypeError: If no cohort has entered.
    """
    require_at_work(state)
    size = num_clients if state.cohort is None else len(state.cohort)
    if not isinstance(views, Views):
        raise ValueError(f"views: found {type(views).__name__}, allowed: Views")
    query, key = jnp.shape(views.query), jnp.shape(views.key)
    if query != key or len(query) != 5 or query[0] != size:
        raise ValueError(
            f"views: found query {query} and key {key}, allowed: two of [M, B, H, W, 3] with M = {size}, "
            "the clients that have entered"
        )
    for view in views:
        _check_floats("views", view, "two_views")


def check_images(images: Array) -> None:
    """Raise UserError for images that cannot have been normalised, since they are integers."""
    _check_floats("images", images, "normalise")


def _check_floats(name: str, images: Array, source: str) -> None:
    dtype = jnp.result_type(images)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UserError(f"{name}: found {dtype}, allowed: floats, from `{source}`")


def check_padding(views: Views, batch_sizes: Sequence[int]) -> None:
    """Raise ValueError unless `views` are padded to the largest of `batch_sizes` [M]."""
    wanted = len(batch_sizes), max(batch_sizes)
    if (found := jnp.shape(views.query)[:2]) != wanted:
        raise ValueError(
            f"views: found {found[0]} clients with batches of {found[1]}, allowed: {wanted[0]} and "
            f"{wanted[1]}, the number and the largest of batch_sizes"
        )


def _check_cohort(cohort: Array | np.ndarray, num_clients: int) -> None:
    if jnp.ndim(cohort) != 1 or not jnp.issubdtype(jnp.result_type(cohort), jnp.integer):
        raise ValueError(f"cohort: found {cohort!r}, allowed: [M] whole numbers, or None")
    if isinstance(cohort, jax.core.Tracer):  # the numbers are not known yet
        return
    numbers = np.asarray(cohort)
    for number in numbers[(numbers < 0) | (numbers >= num_clients)][:1]:
        raise ValueError(f"cohort: found client {number}, allowed: 0 to {num_clients - 1}")
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError("cohort: found a client twice, allowed: each at most once")


def _require_at_rest(state: TrainState) -> None:
    if not isinstance(state, TrainState):
        raise TypeError(f"state: found {type(state).__name__}, allowed: TrainState, from `init` or `leave`")


def require_at_work(state: CohortState) -> None:
    """Raise TypeError for a state in which no cohort has entered."""
    if not isinstance(state, CohortState):
        raise TypeError(f"state: found {type(state).__name__}, allowed: CohortState, from `enter`")


def _divide(state: ClientState, own: ClientState) -> tuple[ClientState, ClientState]:
    """The parts that each client has of its own, and those that all share; None in place of the others."""
    pairs = list(zip(state, own, strict=True))
    return (
        ClientState(*(part if mine else None for part, mine in pairs)),
        ClientState(*(None if mine else part for part, mine in pairs)),
    )


def _combine(own: ClientState, shared: ClientState) -> ClientState:
    return ClientState(*(b if a is None else a for a, b in zip(own, shared, strict=True)))


def _mean_of_equals(leaf: Array) -> Array:
    """The mean over the leading axis in the dtype of `leaf`, without rounding if all rows are equal."""
    if leaf.dtype == jnp.bool_:  # what most rows say
        return jnp.mean(leaf, axis=0) >= 0.5
    return leaf[0] + jnp.mean(leaf - leaf[:1], axis=0).astype(leaf.dtype)
