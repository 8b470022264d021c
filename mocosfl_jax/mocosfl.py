"""MocoSFL: split federated learning with momentum contrast (Li et al., ICLR 2023, algorithm 1)."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from mocosfl_jax import clients, fedavg, moco, optim, server
from mocosfl_jax.augment import Views
from mocosfl_jax.models import Features, SplitModel


class TrainState(NamedTuple):
    """All that training changes. Arrays only, so that it can be donated, sharded, saved and compared."""

    step: Array  # [] int32, training steps done
    clients: clients.ClientState
    server: server.ServerState


class StepInfo(NamedTuple):
    """What a step has to tell. What the caller drops inside a jit is not kept."""

    loss: Array  # []
    top1: Array  # [], contrastive accuracy: share of queries whose positive beats the queue
    smashed: clients.SmashedData  # what crossed the cut upwards
    smashed_grad: Array  # [M, B, h, w, c], what crossed it downwards


class Algorithm(NamedTuple):
    """Pure functions; jit, donation and placement are the caller's.

    `cohort` [M] int32 are the clients that take part, distinct; None means the whole pool in order.
    `step` raises AssertionError if views and cohort do not fit together, and ValueError if the queue is
    smaller than the keys of a step.
    """

    init: Callable[[Array], TrainState]  # rng -> state
    step: Callable[..., tuple[TrainState, StepInfo]]  # state, Views [M, B, H, W, 3], cohort=None
    sync: Callable[..., TrainState]  # state, cohort=None
    encode: Callable[[TrainState, Array], Features]  # state, images [n, H, W, 3] -> Features


def mocosfl(
    model: SplitModel,
    *,
    num_clients: int,
    server_lr: optim.Schedule | float = 0.06,
    client_lr: optim.Schedule | float = 0.06,
    sgd_momentum: float = 0.9,
    weight_decay: float = 5e-4,
    queue_size: int = 6000,
    temperature: float = 0.1,
    momentum: float = 0.99,
    symmetric: bool = True,
) -> Algorithm:
    """MocoSFL with one queue shared by all clients.

    Args:
      model: the network, cut in two.
      num_clients: N, the client pool.
      server_lr: learning rate of the server-side model, or a schedule over training steps.
      client_lr: the same for the client-side models.
      sgd_momentum: of SGD.
      weight_decay: of SGD, on every parameter.
      queue_size: K, at least the keys of a step.
      temperature: T of InfoNCE.
      momentum: tau of the momentum models, client-side and server-side.
      symmetric: the symmetric loss of MoCo V2.

    Returns:
      The algorithm as four functions.
    """
    optimizer = optim.sgd(sgd_momentum, weight_decay)

    def init(rng: Array) -> TrainState:
        rng_model, rng_queue = jax.random.split(rng)
        client_params, server_params = model.init(rng_model)
        queue = moco.init_queue(rng_queue, queue_size, model.key_dim)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            clients=clients.init(client_params, num_clients, optimizer),
            server=server.init(server_params, queue, optimizer),
        )

    def step(state: TrainState, views: Views, cohort: Array | None = None) -> tuple[TrainState, StepInfo]:
        chex.assert_equal_shape(views)
        chex.assert_axis_dimension(views.query, 0, num_clients if cohort is None else len(cohort))
        members = clients.select(state.clients, cohort)
        members, smashed, pullback = clients.forward(model.client, members, views, momentum)

        merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), smashed)  # vector concatenation
        server_state, merged_grad, contrast = server.step(
            lambda params, x: model.server(params, x).projection,
            state.server,
            merged.query,
            merged.key,
            optimizer=optimizer,
            learning_rate=optim.rate(server_lr, state.step),
            momentum=momentum,
            temperature=temperature,
            symmetric=symmetric,
        )
        smashed_grad = merged_grad.reshape(smashed.query.shape)

        members = clients.backward(
            members, pullback, smashed_grad, optimizer, optim.rate(client_lr, state.step)
        )
        new_state = TrainState(
            step=state.step + 1,
            clients=clients.put_back(state.clients, members, cohort),
            server=server_state,
        )
        return new_state, StepInfo(contrast.loss, contrast.top1, smashed, smashed_grad)

    def sync(state: TrainState, cohort: Array | None = None) -> TrainState:
        mean = fedavg.average(state.clients.params, cohort)
        return state._replace(clients=state.clients._replace(params=fedavg.broadcast(mean, num_clients)))

    def encode(state: TrainState, images: Array) -> Features:
        first_client = jax.tree.map(lambda leaf: leaf[0], state.clients.params)
        return model.server(state.server.params, model.client(first_client, images))

    return Algorithm(init, step, sync, encode)
