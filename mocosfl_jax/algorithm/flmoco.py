"""FL-MoCo, the federated baseline of the paper: MoCo on each client, and FedAvg of whole models.

Each client runs the server's step of MocoSFL with a cut before the first layer: it has the whole network and
a queue of its own, and its images take the place of the smashed data. All clients take their steps as one
operation.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax.algorithm import concatenation, optim, pool, server
from mocosfl_jax.algorithm.clients import FEDAVG, ClientState, Sync
from mocosfl_jax.algorithm.interface import EVERYWHERE, Algorithm, CohortState, Models, StepInfo, TrainState
from mocosfl_jax.algorithm.messages import Views
from mocosfl_jax.algorithm.moco import Contrast, ContrastFunction, MomentumContrast, init_queues
from mocosfl_jax.algorithm.moco import check as check_moco
from mocosfl_jax.algorithm.placement import ONE_DEVICE, Placement
from mocosfl_jax.errors import UserError
from mocosfl_jax.models import Features, SplitModel


def flmoco(
    model: SplitModel,
    *,
    num_clients: int,
    moco: MomentumContrast = MomentumContrast(),
    optimizer: optax.GradientTransformation = optim.SGD,
    contrast: ContrastFunction | None = None,
    sync: Sync = FEDAVG,
    placement: Placement = ONE_DEVICE,
) -> Algorithm:
    """FL-MoCo (Li et al. 2023) with the interface of MocoSFL.

    Args:
      model: The network. Its cut does not matter, but both sides must be suited to stacking:
        `split_model(..., stacked_server=True)`.
      num_clients: N, the size of the client pool.
      moco: Settings of momentum contrast. Every client has a queue of `queue_size` keys.
      optimizer: Any Optax optimizer of one client, or `optim.sgd`, whose schedule is over the steps of the
        run.
      contrast: What the clients learn from queries and keys. None: InfoNCE at the temperature in `moco`.
      sync: How the clients are averaged.
      placement: Where arrays live, as for `mocosfl`.

    Returns:
      The algorithm. A client's parameters are both sides of the network, and the queues, with keys [N, K, D],
      belong to the clients. The loss and top1 of a step are means over the clients.

    Raises:
      ValueError: If a setting is impossible.
    """
    check_moco(moco)
    pool.check(num_clients, sync)
    if moco.queue_size == 0:
        raise UserError("moco.queue_size: found 0, allowed: 1 or more")
    for field, allowed in (("full_symmetric", False), ("feature_sharing", True), ("concatenate", True)):
        if (found := getattr(moco, field)) != allowed:
            raise UserError(f"moco.{field}: found {found} for FL-MoCo, allowed: {allowed}")
    optim.check("optimizer", optimizer)
    own = pool.owned(sync)

    def project(params: tuple, images: Array) -> Array:
        features = concatenation.over_views(model.whole_backbone)(params, images)
        return jax.vmap(partial(model.head, params[1]))(features)  # each view is a batch of its own

    def init(rng: Array, models: Models | None = None) -> TrainState:
        rng_model, rng_queues = jax.random.split(rng)
        queues = init_queues(rng_queues, num_clients, moco.queue_size, model.key_dim)
        online, momentum = models or (model.init(rng_model),) * 2
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            pool=pool.init(online, momentum, optimizer, num_clients, sync, own=own, queues=queues),
            server=None,
        )

    def step(state: CohortState, views: Views) -> tuple[CohortState, StepInfo]:
        pool.check_views(state, views, num_clients)

        def local_step(member: ClientState, views: Views) -> tuple[ClientState, Contrast]:
            """The step of one client."""
            local, _, contrasted = server.train(
                project,
                server.ServerState(member.params, member.key_params, member.opt_state, member.queue),
                *views,
                moco=moco,
                optimizer=optimizer,
                step=state.step,
                contrast=contrast,
            )
            return (
                member._replace(
                    params=local.params,
                    key_params=local.key_params,
                    opt_state=local.opt_state,
                    queue=local.queue,
                ),
                contrasted,
            )

        members, contrasted = placement.over_clients(local_step)(state.clients, views)
        info = StepInfo(jnp.mean(contrasted.loss), jnp.mean(contrasted.top1), smashed=None, smashed_grad=None)
        return state._replace(step=state.step + 1, clients=members), info

    def encode(state: TrainState, images: Array) -> Features:
        pool.check_images(images)
        params = pool.online_model(state)
        backbone = placement.over_rows(model.whole_backbone)(params, images[None])[0]
        return Features(backbone, model.head(params[1], backbone))

    return Algorithm(
        init=init,
        enter=partial(pool.enter, num_clients=num_clients, placement=placement),
        step=step,
        sync=partial(pool.synchronize, sync=sync, optimizer=optimizer),
        leave=partial(pool.leave, own=own, placement=placement),
        encode=encode,
        models=lambda state: Models(pool.online_model(state), pool.momentum_model(state)),
        homes=partial(pool.homes, num_clients=num_clients, of_server=lambda state: EVERYWHERE),
    )
