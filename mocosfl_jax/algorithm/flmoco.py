"""FL-MoCo, the federated baseline of the paper: MoCo on each client, and FedAvg of whole models.

Each client runs the server's step of MocoSFL with a cut before the first layer: it has the whole network and
a queue of its own, and its images take the place of the smashed data. All clients take their steps as one
operation.
"""

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax.algorithm import clients, optim, server
from mocosfl_jax.algorithm.clients import FEDAVG, ClientState, Sync
from mocosfl_jax.algorithm.interface import Algorithm, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import Views
from mocosfl_jax.algorithm.moco import MoCoQueue, MomentumContrast, init_queues
from mocosfl_jax.algorithm.placement import ONE_DEVICE, Placement
from mocosfl_jax.models import Features, SplitModel


def flmoco(
    model: SplitModel,
    *,
    num_clients: int,
    moco: MomentumContrast = MomentumContrast(),
    optimizer: optax.GradientTransformation = optim.SGD,
    lr: optim.Schedule | float = 0.06,
    sync: Sync = FEDAVG,
    placement: Placement = ONE_DEVICE,
) -> Algorithm:
    """FL-MoCo (Li et al. 2023) with the interface of MocoSFL.

    Args:
      model: The network. Its cut does not matter, but both sides must be suited to stacking:
        `split_model(..., stacked_server=True)`.
      num_clients: N, the size of the client pool.
      moco: Settings of momentum contrast. Every client has a queue of `queue_size` keys.
      optimizer: Of the clients, without a learning rate.
      lr: Learning rate, or a schedule over training steps.
      sync: How the clients are averaged.
      placement: Where arrays live, as for `mocosfl`.

    Returns:
      The algorithm. Its TrainState has both sides of the network in `clients.params`, and in `server` the
      queues, with keys [N, K, D]. The loss and top1 of a step are means over the clients.
    """

    def project(params: tuple, images: Array) -> Array:
        return model.head(params[1], model.whole_backbone(params, images))

    def init(rng: Array) -> TrainState:
        rng_model, rng_queues = jax.random.split(rng)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            clients=clients.init(model.init(rng_model), num_clients, optimizer),
            server=init_queues(rng_queues, num_clients, moco.queue_size, model.key_dim),
        )

    def step(state: TrainState, views: Views, cohort: Array | None = None) -> tuple[TrainState, StepInfo]:
        chex.assert_equal_shape(views)
        chex.assert_axis_dimension(views.query, 0, num_clients if cohort is None else len(cohort))

        def local_step(
            member: ClientState, queue: MoCoQueue, views: Views
        ) -> tuple[ClientState, MoCoQueue, server.Contrast]:
            """The step of one client."""
            local, _, contrast = server.step(
                project,
                server.ServerState(member.params, member.key_params, member.opt_state, queue),
                *views,
                moco=moco,
                optimizer=optimizer,
                learning_rate=optim.rate(lr, state.step),
            )
            member = ClientState(local.params, local.key_params, local.opt_state, member.scales)
            return member, local.queue, contrast

        members, queues = placement.select((state.clients, state.server), cohort)
        members, queues, contrast = placement.over_clients(local_step)(members, queues, views)
        pool = placement.put_back((state.clients, state.server), (members, queues), cohort)
        info = StepInfo(jnp.mean(contrast.loss), jnp.mean(contrast.top1), smashed=None, smashed_grad=None)
        return TrainState(state.step + 1, *pool), info

    def synchronize(state: TrainState, cohort: Array | None = None) -> tuple[TrainState, SyncInfo]:
        pool, divergence = clients.synchronize(state.clients, cohort, sync)
        return state._replace(clients=pool), SyncInfo(divergence)

    def encode(state: TrainState, images: Array) -> Features:
        params = jax.tree.map(lambda leaf: leaf[0], state.clients.params)
        backbone = placement.over_rows(model.whole_backbone)(params, images[None])[0]
        return Features(backbone, model.head(params[1], backbone))

    return Algorithm(init, step, synchronize, encode, replay=None)
