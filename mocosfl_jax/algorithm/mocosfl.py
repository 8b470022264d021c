"""MocoSFL: split federated learning with momentum contrast (Li et al., ICLR 2023, algorithm 1)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mocosfl_jax.algorithm import clients, concatenation, optim, pool, server
from mocosfl_jax.algorithm.clients import FEDAVG, Sync
from mocosfl_jax.algorithm.interface import Algorithm, CohortState, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.moco import MomentumContrast, init_queue, init_queues, per_client
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
      >>> state = jax.jit(algorithm.enter)(state)
      >>> state, info = jax.jit(algorithm.step)(state, views)
      >>> state, _ = jax.jit(algorithm.sync)(state)
      >>> state = jax.jit(algorithm.leave)(state)
      >>> int(state.step), info.smashed.query.shape
      (1, (8, 8, 8, 4))

    Args:
      model: The network, cut in two.
      num_clients: N, the size of the client pool.
      batch_sizes: The batch size of each place in the cohort, [M], if they differ. Views are then padded to
        the largest. None if every row of the views is an image.
      moco: Settings of momentum contrast, for both sides of the cut.
      optimizer: For both sides, without a learning rate.
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

    own = pool.owned(sync, frozen=frozen)

    def init(rng: Array) -> TrainState:
        rng_model, rng_queue = jax.random.split(rng)
        client_params, server_params = model.init(rng_model)
        queue = queues = None
        if moco.feature_sharing:
            queue = init_queue(rng_queue, moco.queue_size, model.key_dim)
        else:
            queues = init_queues(rng_queue, num_clients, moco.queue_size // num_clients, model.key_dim)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            pool=pool.init(client_params, optimizer, num_clients, sync, own=own, queues=queues),
            server=server.init(server_params, queue, optimizer),
        )

    def size(state: CohortState) -> int:
        """M."""
        return num_clients if state.cohort is None else len(state.cohort)

    def step(state: CohortState, views: Views, send_gradients: bool = True) -> tuple[CohortState, StepInfo]:
        chex.assert_equal_shape(views)
        chex.assert_axis_dimension(views.query, 0, size(state))
        if moco.full_symmetric:
            views = Views(*(jnp.concatenate(both, axis=1) for both in (views, views[::-1])))
        shape = (views.query.shape[0], views.query.shape[1])
        members, smashed, pullback = clients.forward(
            placement.over_clients(model.client), state.clients, views, moco.momentum
        )

        merged = SmashedData(*(placement.merge(x, real) for x in smashed))  # vector concatenation
        state, merged_grad, contrast = serve(state._replace(clients=members), merged, shape)

        sent_back = None
        if send_gradients and not frozen:
            smashed_grad = placement.split(merged_grad, shape, real)
            learning_rate = optim.rate(client_lr, state.step)
            members = clients.backward(state.clients, pullback, smashed_grad, optimizer, learning_rate)
            state, sent_back = state._replace(clients=members), merged_grad
        info = StepInfo(*contrast, smashed=merged, smashed_grad=sent_back)
        return state._replace(step=state.step + 1), info

    def serve(
        state: CohortState, merged: SmashedData, shape: tuple[int, int]
    ) -> tuple[CohortState, Array, server.Contrast]:
        """The server's half of a step, on the concatenated smashed data of M clients with B rows each."""

        def project(params: Any, smashed: Array) -> Array:
            params = placement.gather(params)
            features = placement.over_rows(model.backbone)(params, smashed)
            return jax.vmap(partial(model.head, params))(features)  # each view is a batch of its own

        rate = optim.rate(server_lr, state.step)
        step = partial(server.step, project, moco=moco, optimizer=optimizer, learning_rate=rate)
        if moco.feature_sharing:
            new, merged_grad, contrast = step(state.server, *merged, queue_access=placement.shared)
            return state._replace(server=new), merged_grad, contrast
        own_queues = per_client(
            split=lambda batch: placement.split(batch, shape, real),
            merge=lambda rows: placement.merge(rows, real),
            real=np.ones(shape, bool) if real is None else real,
        )
        with_queues = state.server._replace(queue=state.clients.queue)
        new, merged_grad, contrast = step(with_queues, *merged, queue_access=own_queues)
        members = state.clients._replace(queue=new.queue)
        return state._replace(clients=members, server=new._replace(queue=None)), merged_grad, contrast

    def replay(state: CohortState, smashed: SmashedData) -> tuple[CohortState, StepInfo]:
        shape = (size(state), len(smashed.query) // size(state)) if real is None else real.shape
        state, _, contrast = serve(state, smashed, shape)
        info = StepInfo(*contrast, smashed=None, smashed_grad=None)
        return state._replace(step=state.step + 1), info

    def synchronize(state: CohortState) -> tuple[CohortState, SyncInfo]:
        if frozen or not jax.tree.leaves(state.clients.params):  # the clients are equal and stay equal
            return state, SyncInfo(jnp.zeros(size(state)))
        return pool.synchronize(state, sync=sync)

    def encode(state: TrainState, images: Array) -> Features:
        params = pool.online_model(state), placement.gather(state.server.params)
        backbone = placement.over_rows(model.whole_backbone)(params, images[None])[0]
        return Features(backbone, model.head(params[1], backbone))

    return Algorithm(
        init=init,
        enter=partial(pool.enter, num_clients=num_clients, placement=placement),
        step=step,
        sync=synchronize,
        leave=partial(pool.leave, own=own, placement=placement),
        encode=encode,
        replay=replay,
    )
