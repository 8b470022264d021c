"""The client side: N models stacked along a leading axis, run as one batched operation.

Smashed data leaves and its gradient enters; nothing else passes between this module and the server.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax import optim
from mocosfl_jax.augment import Views
from mocosfl_jax.moco import momentum_update

ClientModel = Callable[[Any, Array], Array]  # params, images [B, H, W, 3] -> smashed data [B, h, w, c]
Pullback = Callable[[Array], Any]  # gradient of smashed queries [M, B, h, w, c] -> gradient of params


class ClientState(NamedTuple):
    """Every leaf has a leading client axis: [N, ...] for the pool, [M, ...] for a cohort."""

    params: Any
    key_params: Any  # the momentum models
    opt_state: Any


class SmashedData(NamedTuple):
    """What a cohort's clients send to the server in a step."""

    query: Array  # [M, B, h, w, c]
    key: Array


def init(params: Any, num_clients: int, optimizer: optax.GradientTransformation) -> ClientState:
    """All clients start from the same `params` (one client's), the momentum models as copies."""

    def stack(leaf: Array) -> Array:
        return jnp.repeat(leaf[None], num_clients, axis=0)

    stacked = jax.tree.map(stack, params)
    # A second stack: donation forbids two leaves that share a buffer.
    return ClientState(stacked, jax.tree.map(stack, params), optimizer.init(stacked))


def select(pool: ClientState, cohort: Array | None) -> ClientState:
    """The states of the clients in `cohort` [M]; None: all of them, in order."""
    return pool if cohort is None else jax.tree.map(lambda leaf: leaf[cohort], pool)


def put_back(pool: ClientState, members: ClientState, cohort: Array | None) -> ClientState:
    """`pool` with the states of the clients in `cohort` [M] replaced by `members`."""
    if cohort is None:
        return members
    return jax.tree.map(lambda leaf, new: leaf.at[cohort].set(new, unique_indices=True), pool, members)


def forward(
    model: ClientModel, state: ClientState, views: Views, momentum: float
) -> tuple[ClientState, SmashedData, Pullback]:
    """Every client's online model on its query views, then its momentum model on its key views.

    The momentum models are updated in between (after the online forward, before their own).
    """
    cohort_model = jax.vmap(model)
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
    """Every client's backward pass from its piece of `smashed_grad` [M, B, h, w, c], and its SGD step."""
    params, opt_state = optim.descend(
        optimizer, pullback(smashed_grad), state.opt_state, state.params, learning_rate
    )
    return state._replace(params=params, opt_state=opt_state)
