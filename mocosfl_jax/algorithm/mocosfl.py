"""MocoSFL: split federated learning with momentum contrast (Li et al., ICLR 2023, algorithm 1)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mocosfl_jax.algorithm import clients, concatenation, optim, pool, server
from mocosfl_jax.algorithm.adversary import Adversary
from mocosfl_jax.algorithm.clients import FEDAVG, ClientLoss, Sync
from mocosfl_jax.algorithm.interface import (
    Algorithm,
    CohortState,
    Models,
    Replay,
    StepInfo,
    SyncInfo,
    TrainState,
)
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.moco import (
    Contrast,
    ContrastFunction,
    MoCoQueue,
    MomentumContrast,
    init_queue,
    init_queues,
    per_client,
)
from mocosfl_jax.algorithm.moco import check as check_moco
from mocosfl_jax.algorithm.noise import Noise, disturb
from mocosfl_jax.algorithm.noise import check as check_noise
from mocosfl_jax.algorithm.placement import ONE_DEVICE, Placement
from mocosfl_jax.algorithm.server import ServerState
from mocosfl_jax.errors import UserError
from mocosfl_jax.models import Features, SplitModel


def mocosfl(
    model: SplitModel,
    *,
    num_clients: int,
    batch_sizes: Sequence[int] | None = None,
    moco: MomentumContrast = MomentumContrast(),
    client_optimizer: optax.GradientTransformation | None = optim.SGD,
    server_optimizer: optax.GradientTransformation = optim.SGD,
    contrast: ContrastFunction | None = None,
    client_loss: ClientLoss | None = None,
    adversary: Adversary | None = None,
    noise: Noise | None = None,
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
      client_optimizer: Any Optax optimizer of one client-side model, or `optim.sgd`, whose schedule is over
        the steps of the run. None freezes the clients: they receive no gradients and are not synchronized.
      server_optimizer: Any Optax optimizer of the server-side model.
      contrast: What the server learns from queries and keys. None: InfoNCE at the temperature in `moco`.
      client_loss: A function (params, anchor) -> [], a further term of each client's loss, of its parameters
        and of those that it had after the last synchronization, such as a proximal term. Its gradient is
        added to the one from the server, which is that of a mean over all rows of the cohort, or of the
        client without concatenation. None: there is none.
      adversary: Is trained against the clients, such as a decoder that reconstructs images from smashed
        queries (`decoder_adversary`). It takes its step before the server does, and its gradient is added to
        the one from the server. None: there is none.
      noise: What clients add to their smashed data in training, after a bound; `encode` adds nothing. None:
        there is none.
      sync: How the clients are averaged.
      placement: Where arrays live. `ONE_DEVICE` runs on any single device; `one_device(forms("cpu"))` is
        faster on a CPU. `parallel.exchange.make_placement` is for several devices, together with
        `parallel.state.distribute`, which takes the algorithm.

    Returns:
      The algorithm. Jit its functions and donate their state.

    Raises:
      ValueError: If a setting is impossible, or queues per client would hold no key.
    """
    check_moco(moco)
    pool.check(num_clients, sync)
    if batch_sizes is not None and not (1 <= len(batch_sizes) <= num_clients and min(batch_sizes) >= 1):
        raise ValueError(
            f"batch_sizes: found {list(batch_sizes)}, allowed: 1 or more for each of at most "
            f"{num_clients} clients"
        )
    if contrast is None and moco.queue_size == 0:
        raise UserError(
            "moco.queue_size: found 0, allowed: 1 or more; 0 is for a contrast of your own without a queue"
        )
    optim.check("server_optimizer", server_optimizer)
    if client_optimizer is not None:
        optim.check("client_optimizer", client_optimizer)
    real = None if batch_sizes is None else concatenation.real_rows(batch_sizes)
    if moco.full_symmetric and real is not None:
        real = np.concatenate([real, real], axis=1)
    if noise is not None:
        check_noise(noise)
    frozen = client_optimizer is None
    if adversary is not None and frozen:
        raise ValueError("adversary: found one of frozen clients, allowed: None with client_optimizer None")
    if not moco.concatenate:
        for argument, given in (("batch_sizes", batch_sizes), ("adversary", adversary)):
            if given is not None:
                raise UserError(f"moco.concatenate: found False with {argument}, allowed: True")
    own_optimizer = optax.identity() if client_optimizer is None else client_optimizer
    if not moco.feature_sharing and 0 < moco.queue_size < num_clients:
        raise UserError(
            f"moco.queue_size: found {moco.queue_size}, allowed: {num_clients} or more for a queue per client"
        )

    own = pool.owned(sync, frozen=frozen)

    def init(rng: Array, models: Models | None = None) -> TrainState:
        rng_model, rng_queue = jax.random.split(rng)
        online, momentum = models or (model.init(rng_model),) * 2
        if adversary is not None and not jax.tree.leaves(online[0]):
            raise ValueError("adversary: found one of clients without parameters, allowed: None for these")
        queue = queues = None
        if moco.queue_size == 0:
            pass
        elif moco.feature_sharing:
            queue = init_queue(rng_queue, moco.queue_size, model.key_dim)
        else:
            queues = init_queues(rng_queue, num_clients, moco.queue_size // num_clients, model.key_dim)
        at_server: Any = server.init(online[1], momentum[1], queue, server_optimizer)
        if adversary is not None:
            # Another key than the two above, which are those of 0 and 1.
            opposing = adversary.init(jax.random.fold_in(rng, 2))
            at_server = server.OpposedServerState(**at_server._asdict(), adversary=opposing)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            pool=pool.init(online[0], momentum[0], own_optimizer, num_clients, sync, own=own, queues=queues),
            server=at_server,
        )

    def size(state: CohortState) -> int:
        """M."""
        return num_clients if state.cohort is None else len(state.cohort)

    def step(state: CohortState, views: Views) -> tuple[CohortState, StepInfo]:
        return train(state, views, send_gradients=not frozen)

    def train(state: CohortState, views: Views, *, send_gradients: bool) -> tuple[CohortState, StepInfo]:
        pool.check_views(state, views, num_clients)
        if batch_sizes is not None:
            pool.check_padding(views, batch_sizes)
        if moco.full_symmetric:
            views = Views(*(jnp.concatenate(both, axis=1) for both in (views, views[::-1])))
        shape = (views.query.shape[0], views.query.shape[1])
        if not moco.feature_sharing:
            check_queues(shape[1])
        members, smashed, pullback = clients.forward(
            placement.over_clients(model.client),
            state.clients,
            views,
            moco.momentum,
            None if noise is None else lambda smashed, kind: disturb(smashed, noise, state.step, kind),
        )

        merged = SmashedData(*(placement.merge(x, real) for x in smashed))  # vector concatenation
        state = state._replace(clients=members)
        against = None  # gradient of the adversary's term
        if adversary is not None and send_gradients:
            attacker, against = adversary.step(
                state.server.adversary, merged.query, placement.merge(views.query, real), state.step
            )
            state = state._replace(server=state.server._replace(adversary=attacker))
        state, merged_grad, contrasted = serve(state, merged, shape)

        sent_back = None
        if send_gradients:
            if against is not None:
                merged_grad += against
            smashed_grad = placement.split(merged_grad, shape, real)
            members = clients.backward(
                state.clients, pullback, smashed_grad, own_optimizer, state.step, client_loss
            )
            state, sent_back = state._replace(clients=members), merged_grad
        info = StepInfo(*contrasted, smashed=merged, smashed_grad=sent_back)
        return state._replace(step=state.step + 1), info

    def check_queues(keys: int) -> None:
        """Raise UserError unless each client's queue has room for its keys of a step."""
        held = moco.queue_size // num_clients
        if 0 < held < keys:
            raise UserError(
                f"moco.queue_size: found {moco.queue_size}, {held} for each of {num_clients} clients, "
                f"allowed: {keys * num_clients} or more, {keys} for each"
            )

    def serve(
        state: CohortState, merged: SmashedData, shape: tuple[int, int], arrived: Array | None = None
    ) -> tuple[CohortState, Array, Contrast]:
        """The server's half of a step, on the smashed data of M clients with B rows each.

        They are one batch or, without concatenation, one batch after another.
        """

        def project(params: Any, smashed: Array) -> Array:
            params = placement.gather(params)
            features = placement.over_rows(model.backbone)(params, smashed)
            return jax.vmap(partial(model.head, params))(features)  # each view is a batch of its own

        train_server = partial(
            server.train,
            project,
            moco=moco,
            optimizer=server_optimizer,
            step=state.step,
            contrast=at_place(contrast),
            arrived=arrived,
        )
        if not moco.concatenate:
            return serve_one_by_one(train_server, state, merged, shape)
        if moco.feature_sharing or moco.queue_size == 0:
            new, merged_grad, contrasted = train_server(state.server, *merged, queue_access=placement.shared)
            return state._replace(server=new), merged_grad, contrasted
        own_queues = per_client(
            split=lambda batch: placement.split(batch, shape, real),
            merge=lambda rows: placement.merge(rows, real),
            real=np.ones(shape, bool) if real is None else real,
        )
        with_queues = state.server._replace(queue=state.clients.queue)
        new, merged_grad, contrasted = train_server(with_queues, *merged, queue_access=own_queues)
        members = state.clients._replace(queue=new.queue)
        return state._replace(clients=members, server=new._replace(queue=None)), merged_grad, contrasted

    def serve_one_by_one(
        train_server: Callable[..., tuple[ServerState, Array, Contrast]],
        state: CohortState,
        merged: SmashedData,
        shape: tuple[int, int],
    ) -> tuple[CohortState, Array, Contrast]:
        """Without vector concatenation: the rows of each client are a step of the server, in cohort order.

        All of these steps have the learning rate of the training step that they are part of.
        """

        def serve_client(
            at_server: ServerState, of_client: tuple[SmashedData, MoCoQueue | None]
        ) -> tuple[ServerState, tuple[Array, Contrast, MoCoQueue | None]]:
            smashed, queue = of_client
            if queue is None:  # the server's, or none
                at_server, grad, contrasted = train_server(at_server, *smashed, queue_access=placement.shared)
                return at_server, (grad, contrasted, None)
            at_server, grad, contrasted = train_server(at_server._replace(queue=queue), *smashed)
            return at_server._replace(queue=None), (grad, contrasted, at_server.queue)

        everywhere = partial(jax.tree.map, placement.everywhere)
        rows = SmashedData(*(concatenation.split(x, shape) for x in everywhere(merged)))
        at_server, (grads, contrasted, queues) = jax.lax.scan(
            serve_client, state.server, (rows, everywhere(state.clients.queue))
        )
        state = state._replace(server=at_server, clients=state.clients._replace(queue=queues))
        return state, concatenation.merge(grads), Contrast(*map(jnp.mean, contrasted))

    def at_place(contrast: ContrastFunction | None) -> ContrastFunction | None:
        """The same contrast, on the server's parameters where they are used."""
        if contrast is None:
            return None
        return lambda params, *others: contrast(placement.gather(params), *others)

    def train_server_alone(
        state: CohortState, smashed: SmashedData, arrived: Array | None = None
    ) -> tuple[CohortState, StepInfo]:
        shape = (size(state), len(smashed.query) // size(state)) if real is None else real.shape
        state, smashed_grad, contrasted = serve(state, smashed, shape, arrived)
        info = StepInfo(*contrasted, smashed=None, smashed_grad=smashed_grad)
        return state._replace(step=state.step + 1), info

    def synchronize(state: CohortState) -> tuple[CohortState, SyncInfo]:
        pool.require_at_work(state)
        if frozen or not jax.tree.leaves(state.clients.params):  # the clients are equal and stay equal
            return state, SyncInfo(jnp.zeros(size(state)))
        return pool.synchronize(state, sync=sync, optimizer=own_optimizer)

    def encode(state: TrainState, images: Array) -> Features:
        pool.check_images(images)
        params = pool.online_model(state), placement.gather(state.server.params)
        backbone = placement.over_rows(model.whole_backbone)(params, images[None])[0]
        return Features(backbone, model.head(params[1], backbone))

    return Algorithm(
        init=init,
        enter=partial(
            pool.enter, num_clients=num_clients, placement=placement, anchored=client_loss is not None
        ),
        step=step,
        sync=synchronize,
        leave=partial(pool.leave, own=own, placement=placement),
        encode=encode,
        models=pool.models,
        homes=partial(pool.homes, num_clients=num_clients, of_server=server.homes),
        replay=Replay(keep=partial(train, send_gradients=False), train=train_server_alone),
    )
