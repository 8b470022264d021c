"""FL-MoCo, the federated baseline of the paper: MoCo on each client, and FedAvg of whole models.

Each client runs the server's step of MocoSFL with a cut before the first layer: it has the whole network and
a queue of its own, and its images take the place of the smashed data. All clients take their steps as one
operation.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax.algorithm import concatenation, optim, pool, server
from mocosfl_jax.algorithm.clients import FEDAVG, ClientState, Sync
from mocosfl_jax.algorithm.interface import Algorithm, CohortState, StepInfo, TrainState
from mocosfl_jax.algorithm.messages import Views
from mocosfl_jax.algorithm.moco import MomentumContrast, init_queues
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
      The algorithm. A client's parameters are both sides of the network, and the queues, with keys [N, K, D],
      belong to the clients. The loss and top1 of a step are means over the clients.
    """
    own = pool.owned(sync)

    def project(params: tuple, images: Array) -> Array:
        features = concatenation.over_views(model.whole_backbone)(params, images)
        return jax.vmap(partial(model.head, params[1]))(features)  # each view is a batch of its own

    def init(rng: Array) -> TrainState:
        rng_model, rng_queues = jax.random.split(rng)
        queues = init_queues(rng_queues, num_clients, moco.queue_size, model.key_dim)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            pool=pool.init(model.init(rng_model), optimizer, num_clients, sync, own=own, queues=queues),
            server=None,
        )

    def step(state: CohortState, views: Views) -> tuple[CohortState, StepInfo]:
        chex.assert_equal_shape(views)
        chex.assert_axis_dimension(views.query, 0, num_clients if state.cohort is None else len(state.cohort))

        def local_step(member: ClientState, views: Views) -> tuple[ClientState, server.Contrast]:
            """The step of one client."""
            local, _, contrast = server.step(
                project,
                server.ServerState(member.params, member.key_params, member.opt_state, member.queue),
                *views,
                moco=moco,
                optimizer=optimizer,
                learning_rate=optim.rate(lr, state.step),
            )
            return (
                member._replace(
                    params=local.params,
                    key_params=local.key_params,
                    opt_state=local.opt_state,
                    queue=local.queue,
                ),
                contrast,
            )

        members, contrast = placement.over_clients(local_step)(state.clients, views)
        info = StepInfo(jnp.mean(contrast.loss), jnp.mean(contrast.top1), smashed=None, smashed_grad=None)
        return state._replace(step=state.step + 1, clients=members), info

    def encode(state: TrainState, images: Array) -> Features:
        params = pool.online_model(state)
        backbone = placement.over_rows(model.whole_backbone)(params, images[None])[0]
        return Features(backbone, model.head(params[1], backbone))

    return Algorithm(
        init=init,
        enter=partial(pool.enter, num_clients=num_clients, placement=placement),
        step=step,
        sync=partial(pool.synchronize, sync=sync),
        leave=partial(pool.leave, own=own, placement=placement),
        encode=encode,
        replay=None,
    )
