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
from mocosfl_jax.errors import UserError

# The client-side models of a cohort: params [M, ...], images [M, B, H, W, 3] -> smashed data [M, B, h, w, c]
CohortModel = Callable[[Any, Array], Array]
# A term of a client's loss: its parameters, and those after its last synchronization -> []
ClientLoss = Callable[[Any, Any], Array]
# Smashed data [M, B, h, w, c], and 0 for queries or 1 for keys -> as they leave the clients
Disturb = Callable[[Array, int], Array]
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
    # Parameters after the last synchronization, for a term of the clients' loss; None without such a term
    anchor: Any = None


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
    # Also average the momentum models: MonAcoSFL (Przewięźlikowski et al. 2024)
    momentum_models: bool = False
    # What happens to the state of the clients' optimizers, such as SGD buffers: "keep", "reset" or "average"
    buffers: str = "keep"
    # First lambda of divergence-aware averaging (Zhuang et al. 2022); None: clients receive the average
    divergence_lambda: float | None = None
    # The average: models stacked over the cohort, leaves [M, ...], and weights [M] or None -> one model. Any
    # function of these, such as a trimmed mean.
    average: Callable[[Any, Array | None], Any] = fedavg.average


FEDAVG = Sync()
BUFFERS = ("keep", "reset", "average")


def check(sync: Sync, num_clients: int) -> None:
    """Raise ValueError for settings of `sync` that are impossible with `num_clients` clients."""
    if sync.buffers not in BUFFERS:
        raise ValueError(f"sync.buffers: found {sync.buffers!r}, allowed: {', '.join(BUFFERS)}")
    if sync.divergence_lambda is not None and not 0 < sync.divergence_lambda < np.inf:
        raise ValueError(
            f"sync.divergence_lambda: found {sync.divergence_lambda}, allowed: more than 0, or None"
        )
    if sync.weights is not None:
        weights = np.asarray(sync.weights)
        if weights.shape != (num_clients,):
            raise ValueError(f"sync.weights: found shape {weights.shape}, allowed: ({num_clients},)")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise ValueError("sync.weights: found negative, not finite or only zero weights, allowed: others")


def select(pool: Stacked, cohort: Array | None) -> Stacked:
    """The rows of `pool` [N, ...] that belong to the clients in `cohort` [M]; None selects all, in order.

    The row of a client from N on is NaN. Negative numbers count from the end.
    """
    if cohort is None:
        return pool
    return jax.tree.map(lambda leaf: leaf.at[cohort].get(mode="fill", unique_indices=True), pool)


def put_back(pool: Stacked, members: Stacked, cohort: Array | None) -> Stacked:
    """`pool` [N, ...] with the rows of the clients in `cohort` [M] replaced by `members` [M, ...]."""
    if cohort is None:
        return members
    return jax.tree.map(lambda leaf, new: leaf.at[cohort].set(new, unique_indices=True), pool, members)


def forward(
    cohort_model: CohortModel,
    state: ClientState,
    views: Views,
    momentum: float,
    disturb: Disturb | None = None,
) -> tuple[ClientState, SmashedData, Pullback]:
    """Run every client's online model on its query views, and its momentum model on its key views.

    The momentum models are updated after the online forward pass and before their own.

    Args:
      cohort_model: The client-side model, over stacked clients.
      state: Of the cohort, leaves [M, ...].
      views: [M, B, H, W, 3] each.
      momentum: tau of the momentum models.
      disturb: What clients do to smashed data before they leave; None: nothing.

    Returns:
      The state with new momentum models, the smashed data [M, B, h, w, c], and the pullback that maps the
      gradient of the smashed queries to the gradient of the parameters.
    """

    def smash(params: Any, images: Array, kind: int) -> Array:
        smashed = cohort_model(params, images)
        return smashed if disturb is None else disturb(smashed, kind)

    query, pullback = jax.vjp(lambda params: smash(params, views.query, 0), state.params)
    key_params = momentum_update(state.key_params, state.params, momentum)
    key = smash(key_params, views.key, 1)
    return state._replace(key_params=key_params), SmashedData(query, key), lambda grad: pullback(grad)[0]


def backward(
    state: ClientState,
    pullback: Pullback,
    smashed_grad: Array,
    optimizer: optax.GradientTransformation,
    step: Array,
    client_loss: ClientLoss | None = None,
) -> ClientState:
    """Run every client's backward pass from its rows of `smashed_grad` [M, B, h, w, c], and update it.

    Args:
      state: Of the cohort, leaves [M, ...].
      pullback: From `forward`.
      smashed_grad: Gradient of the server's loss.
      optimizer: Of one client.
      step: [], training step of the run.
      client_loss: A further term of each client's loss.

    Raises:
      UserError: If `client_loss` gives another shape than one number.
    """
    if not jax.tree.leaves(state.params):  # clients without layers
        return state
    grads = pullback(smashed_grad)
    if client_loss is not None:
        terms = jax.eval_shape(jax.vmap(client_loss), state.params, state.anchor)
        if getattr(terms, "ndim", None) != 1:
            found = f"shape {terms.shape[1:]}" if hasattr(terms, "shape") else type(terms).__name__
            raise UserError(f"client_loss: found an output of {found}, allowed: one number")
        more = jax.vmap(jax.grad(client_loss))(state.params, state.anchor)
        grads = jax.tree.map(jnp.add, grads, more)
    descend = jax.vmap(partial(optim.descend, optimizer), in_axes=(0, 0, 0, None))
    params, opt_state = descend(grads, state.opt_state, state.params, step)
    return state._replace(params=params, opt_state=opt_state)


def synchronize(
    state: ClientState, weights: Array | None, how: Sync, optimizer: optax.GradientTransformation
) -> tuple[ClientState, Any, Array]:
    """FedAvg: average the models of the cohort and load the mean into its clients (McMahan et al. 2017).

    Args:
      state: Of the cohort, leaves [M, ...].
      weights: [M], weight of each client in the average; None for equal weights.
      how: What else is averaged. Its weights, of the whole pool, are not used.
      optimizer: Of one client, for a state that starts anew.

    Returns:
      The new state, the average of the online models, and the distance of each client from it, [M].

    Raises:
      UserError: If `how.average` returns anything but one model.
    """

    def average(stacked: Any) -> Any:
        mean = how.average(stacked, weights)
        _check_average(mean, stacked)
        return mean

    def mean_for_all(stacked: Any) -> Any:
        return fedavg.load(average(stacked), stacked)

    mean = average(state.params)
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
        new = new._replace(opt_state=jax.vmap(optimizer.init)(new.params))
    elif how.buffers == "average":
        new = new._replace(opt_state=mean_for_all(state.opt_state))
    if state.anchor is not None:
        # A copy, since donation forbids two leaves that share a buffer.
        new = new._replace(anchor=jax.tree.map(jnp.copy, new.params))
    return new, mean, divergences


def _check_average(mean: Any, stacked: Any) -> None:
    """Refuse an average that still has the axis of the clients: it would leave each client as it was."""
    found, allowed = str(jax.tree.structure(mean)), str(jax.tree.structure(stacked))
    if found != allowed:
        raise UserError(f"sync.average: found a function that returns {found}, allowed: one model, {allowed}")
    for (path, leaf), many in zip(jax.tree.leaves_with_path(mean), jax.tree.leaves(stacked), strict=True):
        if jnp.shape(leaf) != many.shape[1:]:
            raise UserError(
                f"sync.average: found shape {jnp.shape(leaf)} at {jax.tree_util.keystr(path) or 'the root'}, "
                f"allowed: {many.shape[1:]}, the mean of {many.shape} over the clients"
            )
