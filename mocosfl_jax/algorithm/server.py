"""The server side: one model on the concatenated smashed data of the cohort, trained by momentum contrast."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.interface import EVERYWHERE, QUEUE, SERVER
from mocosfl_jax.algorithm.moco import (
    SHARED,
    Contrast,
    ContrastFunction,
    MoCoQueue,
    MomentumContrast,
    QueueAccess,
    checked,
    momentum_contrast,
    momentum_update,
    normalise,
)
from mocosfl_jax.errors import UserError

# params, smashed data [views, n, h, w, c] -> projections [views, n, D]; each view is a batch of its own
Projection = Callable[[Any, Array], Array]


class ServerState(NamedTuple):
    """The state of the server."""

    params: Any
    key_params: Any  # parameters of the momentum model
    opt_state: Any
    queue: Any  # `MoCoQueue` that all clients share; None if each client has its own, or there is none


class OpposedServerState(NamedTuple):
    """The state of a server with an adversary of the clients: a `ServerState`, and that of the adversary.

    A type of its own, so that checkpoints of runs without an adversary do not change.
    """

    params: Any
    key_params: Any
    opt_state: Any
    queue: Any
    adversary: Any  # state of an `Adversary`


def homes(state: ServerState | OpposedServerState) -> ServerState | OpposedServerState:
    """Where each part of the server's state lives, see `Algorithm.homes`."""
    queue = None if state.queue is None else MoCoQueue(keys=QUEUE, cursor=EVERYWHERE)
    own = ServerState(SERVER, SERVER, SERVER, queue)
    return OpposedServerState(*own, EVERYWHERE) if isinstance(state, OpposedServerState) else own


def init(
    params: Any, key_params: Any, queue: MoCoQueue | None, optimizer: optax.GradientTransformation
) -> ServerState:
    """The first state, of copies: donation deletes arrays, and forbids two leaves that share a buffer."""
    params, key_params = (jax.tree.map(jnp.copy, model) for model in (params, key_params))
    return ServerState(params, key_params, optimizer.init(params), queue)


def train(
    project: Projection,
    state: ServerState,
    smashed_query: Array,
    smashed_key: Array,
    *,
    moco: MomentumContrast,
    optimizer: optax.GradientTransformation,
    step: Array,
    contrast: ContrastFunction | None = None,
    queue_access: QueueAccess = SHARED,
    arrived: Array | None = None,
) -> tuple[ServerState, Array, Contrast]:
    """One step of MoCo on the concatenated smashed data of the cohort (He et al. 2020, algorithm 1).

    Args:
      project: The server-side model with its head, without normalisation.
      state: Of the server, with the queue, or queues, that `queue_access` expects.
      smashed_query: [n, h, w, c] with n = M * B rows, ordered by client.
      smashed_key: [n, h, w, c]; a constant, also where it is used as a query.
      moco: Settings. If symmetric, the key views also serve as queries, and both sets of keys are enqueued.
        Under the full symmetric loss the rows already contain both views.
      optimizer: Of the server.
      step: [], training step of the run.
      contrast: What is learned; None: `momentum_contrast` at the temperature in `moco`.
      queue_access: How rows meet the queue: one queue for all clients, or one for each.
      arrived: [n] bool, the rows that clients have sent. The others have no part in the loss and the queue,
        and their gradient is zero. Only where the server treats each row by itself. None: all rows.

    Returns:
      The new state, the gradient of the loss with respect to `smashed_query` [n, h, w, c], and the contrast.

    Raises:
      ValueError: If the queue is smaller than the keys of one view.
    """
    chex.assert_equal_shape((smashed_query, smashed_key))
    symmetric = moco.symmetric and not moco.full_symmetric
    # The momentum model is updated before any forward pass.
    key_params = momentum_update(state.key_params, state.params, moco.momentum)

    contrast = contrast or momentum_contrast(moco.temperature, arrived)

    def embed(params: Any, *views: Array) -> Array:
        """Projections [views, n, D]."""
        return project(params, jnp.stack(views))

    def similarities(query: Array) -> Array:
        if state.queue is None:
            raise UserError("moco.queue_size: found 0, allowed: 1 or more for a contrast with a queue")
        return queue_access.similarities(state.queue, query)

    keys = embed(key_params, *([smashed_query] if symmetric else []), smashed_key)

    def loss_fn(params: Any, smashed_query: Array) -> tuple[Array, Contrast]:
        queries = embed(params, smashed_query, *([smashed_key] if symmetric else []))
        directions = [
            checked(contrast(params, query, key, similarities))
            for query, key in zip(queries, keys[::-1], strict=True)  # q1 with k2, q2 with k1
        ]
        loss = sum((direction.loss for direction in directions), jnp.zeros(()))
        return loss, Contrast(loss, directions[-1].top1)

    (grads, smashed_grad), contrasted = jax.grad(loss_fn, argnums=(0, 1), has_aux=True)(
        state.params, smashed_query
    )
    params, opt_state = optim.descend(optimizer, grads, state.opt_state, state.params, step)
    queue = state.queue  # enqueued only now: the loss uses the keys of earlier steps
    if queue is not None:
        for keys_of_view in normalise(keys):
            queue = queue_access.enqueue(queue, keys_of_view, arrived)
    new = state._replace(params=params, key_params=key_params, opt_state=opt_state, queue=queue)
    return new, smashed_grad, contrasted
