"""MocoSFL: split federated learning with momentum contrast (Li et al., ICLR 2023, algorithm 1)."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mocosfl_jax.algorithm import clients, concatenation, optim, server
from mocosfl_jax.algorithm.clients import FEDAVG, Sync
from mocosfl_jax.algorithm.interface import Algorithm, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.moco import MomentumContrast, QueueAccess, init_queue, init_queues, per_client
from mocosfl_jax.algorithm.placement import ONE_DEVICE, Placement
from mocosfl_jax.models import Features, SplitModel


def mocosfl(
    model: SplitModel,
    *,
    num_clients: int,
    batch_sizes: Sequence[int] | None = None,
    moco: MomentumContrast = MomentumContrast(),
    optimizer: optax.GradientTransformation = optim.SGD,
    server_lr: optim.Schedule | float = 0.06,
    client_lr: optim.Schedule | float = 0.06,
    sync: Sync = FEDAVG,
    placement: Placement = ONE_DEVICE,
) -> Algorithm:
    """MocoSFL (Li et al. 2023, algorithm 1) as pure functions.

    Example:
      >>> import jax
      >>> from mocosfl_jax import MomentumContrast, mocosfl, split_model, two_views
      >>> model = split_model("resnet18", cut_layer=1, width=4, image_size=8, key_dim=8)
      >>> algorithm = mocosfl(model, num_clients=4, moco=MomentumContrast(queue_size=16))
      >>> state = jax.jit(algorithm.init)(jax.random.key(0))
      >>> images = jax.random.uniform(jax.random.key(1), (4, 2, 8, 8, 3))  # [clients, batch, H, W, RGB]
      >>> views = two_views(jax.random.key(2), images, size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
      >>> state, info = jax.jit(algorithm.step)(state, views)
      >>> state, _ = jax.jit(algorithm.sync)(state)
      >>> int(state.step), info.smashed.query.shape
      (1, (8, 8, 8, 4))

    Args:
      model: The network, cut in two.
      num_clients: N, the size of the client pool.
      batch_sizes: The batch size of each place in the cohort, [M], if they differ. Views are then padded to
        the largest. None if every row of the views is an image.
      moco: Settings of momentum contrast, for both sides of the cut.
      optimizer: For both sides, without a learning rate. It must act element-wise, since it is applied to
        stacked clients.
      server_lr: Learning rate of the server-side model, or a schedule over training steps.
      client_lr: Learning rate of the client-side models, or a schedule. The number 0 freezes the clients:
        they receive no gradients and are not synchronized.
      sync: How the clients are averaged.
      placement: Where arrays live. `ONE_DEVICE` runs on any single device; `one_device(forms("cpu"))` is
        faster on a CPU; `parallel.exchange.make_placement` is for several devices.

    Returns:
      The algorithm. Jit its functions and donate their state.

    Raises:
      ValueError: If queues per client would hold no key.
    """
    real = None if batch_sizes is None else concatenation.real_rows(batch_sizes)
    if moco.full_symmetric and real is not None:
        real = np.concatenate([real, real], axis=1)
    frozen = isinstance(client_lr, float | int) and client_lr == 0
    if not moco.feature_sharing and moco.queue_size < num_clients:
        raise ValueError(f"{num_clients} queues cannot be made of {moco.queue_size} keys")

    def init(rng: Array) -> TrainState:
        rng_model, rng_queue = jax.random.split(rng)
        client_params, server_params = model.init(rng_model)
        if moco.feature_sharing:
            queue = init_queue(rng_queue, moco.queue_size, model.key_dim)
        else:
            queue = init_queues(rng_queue, num_clients, moco.queue_size // num_clients, model.key_dim)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            clients=clients.init(client_params, num_clients, optimizer),
            server=server.init(server_params, queue, optimizer),
        )

    def step(
        state: TrainState, views: Views, cohort: Array | None = None, send_gradients: bool = True
    ) -> tuple[TrainState, StepInfo]:
        chex.assert_equal_shape(views)
        chex.assert_axis_dimension(views.query, 0, num_clients if cohort is None else len(cohort))
        if moco.full_symmetric:
            views = Views(*(jnp.concatenate(both, axis=1) for both in (views, views[::-1])))
        shape = (views.query.shape[0], views.query.shape[1])
        members = placement.select(state.clients, cohort)
        members, smashed, pullback = clients.forward(
            placement.over_clients(model.client), members, views, moco.momentum
        )

        merged = SmashedData(*(placement.merge(x, real) for x in smashed))  # vector concatenation
        server_state, merged_grad, contrast = serve(state, merged, cohort, shape)

        if send_gradients and not frozen:
            smashed_grad = placement.split(merged_grad, shape, real)
            learning_rate = optim.rate(client_lr, state.step)
            members = clients.backward(members, pullback, smashed_grad, optimizer, learning_rate)
            sent_back = merged_grad
        else:
            sent_back = None
        new_state = TrainState(
            step=state.step + 1,
            clients=placement.put_back(state.clients, members, cohort),
            server=server_state,
        )
        return new_state, StepInfo(*contrast, smashed=merged, smashed_grad=sent_back)

    def serve(
        state: TrainState, merged: SmashedData, cohort: Array | None, shape: tuple[int, int]
    ) -> tuple[server.ServerState, Array, server.Contrast]:
        def project(params: Any, smashed: Array) -> Array:
            params = placement.gather(params)
            return model.head(params, placement.over_rows(model.backbone)(params, smashed))

        return server.step(
            project,
            state.server,
            *merged,
            moco=moco,
            optimizer=optimizer,
            learning_rate=optim.rate(server_lr, state.step),
            queue_access=placement.shared if moco.feature_sharing else own_queues(cohort, shape),
        )

    def own_queues(cohort: Array | None, shape: tuple[int, int]) -> QueueAccess:
        return per_client(
            select=lambda queues: placement.select(queues, cohort),
            put_back=lambda queues, new: placement.put_back(queues, new, cohort),
            split=lambda batch: placement.split(batch, shape, real),
            merge=lambda rows: placement.merge(rows, real),
            real=np.ones(shape, bool) if real is None else real,
        )

    def replay(
        state: TrainState, smashed: SmashedData, cohort: Array | None = None
    ) -> tuple[TrainState, StepInfo]:
        places = num_clients if cohort is None else len(cohort)
        shape = (places, len(smashed.query) // places) if real is None else real.shape
        server_state, _, contrast = serve(state, smashed, cohort, shape)
        new_state = state._replace(step=state.step + 1, server=server_state)
        return new_state, StepInfo(*contrast, smashed=None, smashed_grad=None)

    def synchronize(state: TrainState, cohort: Array | None = None) -> tuple[TrainState, SyncInfo]:
        if frozen or not jax.tree.leaves(state.clients.params):  # the clients are equal and stay equal
            return state, SyncInfo(jnp.zeros(num_clients if cohort is None else len(cohort)))
        pool, divergence = clients.synchronize(state.clients, cohort, sync)
        return state._replace(clients=pool), SyncInfo(divergence)

    def encode(state: TrainState, images: Array) -> Features:
        first_client = jax.tree.map(lambda leaf: leaf[0], state.clients.params)
        params = first_client, placement.gather(state.server.params)
        backbone = placement.over_rows(model.whole_backbone)(params, images[None])[0]
        return Features(backbone, model.head(params[1], backbone))

    return Algorithm(init, step, synchronize, encode, replay)
