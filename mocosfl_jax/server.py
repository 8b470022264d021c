"""The server side: one model on the concatenated smashed data of the cohort, contrasted by MoCo."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax import moco, optim
from mocosfl_jax.moco import MoCoQueue

Projection = Callable[[Any, Array], Array]  # params, smashed data [n, h, w, c] -> embeddings [n, D]


class ServerState(NamedTuple):
    params: Any
    key_params: Any  # the momentum model
    opt_state: Any
    queue: MoCoQueue  # shared by all clients


class Contrast(NamedTuple):
    """How well the server told the positives from the queue."""

    loss: Array  # []; the sum of both directions if symmetric
    top1: Array  # []; of the last direction computed


def init(params: Any, queue: MoCoQueue, optimizer: optax.GradientTransformation) -> ServerState:
    """The momentum model starts as a copy: donation forbids two leaves that share a buffer."""
    return ServerState(params, jax.tree.map(jnp.copy, params), optimizer.init(params), queue)


def step(
    project: Projection,
    state: ServerState,
    smashed_query: Array,
    smashed_key: Array,
    *,
    optimizer: optax.GradientTransformation,
    learning_rate: Array,
    momentum: float,
    temperature: float,
    symmetric: bool,
) -> tuple[ServerState, Array, Contrast]:
    """One step of MoCo on the concatenated smashed data of the cohort.

    Args:
      project: the server-side model with its head, without normalisation.
      state: server state.
      smashed_query: [n, h, w, c], n = M * B, client by client.
      smashed_key: the same shape; a constant, also where it is used as a query.
      optimizer: without learning rate, as `optim.sgd`.
      learning_rate: [].
      momentum: tau of the momentum model, which is updated before any forward pass.
      temperature: T of InfoNCE.
      symmetric: also contrast the key views as queries, and enqueue both sets of keys.

    Returns:
      The new state, the gradient of the loss by `smashed_query`, and the contrast.
    """
    n = smashed_query.shape[0]
    key_params = moco.momentum_update(state.key_params, state.params, momentum)
    # Both views go through a model as one batch of 2n: rows do not see each other.
    both = jnp.concatenate([smashed_query, smashed_key])
    keys = moco.normalise(project(key_params, both if symmetric else smashed_key))
    keys_of_key_views = keys[-n:]

    def loss_fn(params: Any, smashed_query: Array) -> tuple[Array, Contrast]:
        if not symmetric:
            queries = moco.normalise(project(params, smashed_query))
            loss, top1 = moco.info_nce(queries, keys_of_key_views, state.queue, temperature)
            return loss, Contrast(loss, top1)
        queries = moco.normalise(project(params, jnp.concatenate([smashed_query, smashed_key])))
        loss_12, _ = moco.info_nce(queries[:n], keys_of_key_views, state.queue, temperature)
        loss_21, top1 = moco.info_nce(queries[n:], keys[:n], state.queue, temperature)
        return loss_12 + loss_21, Contrast(loss_12 + loss_21, top1)

    (grads, smashed_grad), contrast = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
        state.params, smashed_query
    )
    params, opt_state = optim.descend(optimizer, grads, state.opt_state, state.params, learning_rate)
    queue = moco.enqueue(state.queue, keys)  # the loss has used the queue before this
    return ServerState(params, key_params, opt_state, queue), smashed_grad, contrast
