"""The network and the algorithm of a configuration."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.clients import Sync
from mocosfl_jax.algorithm.flmoco import flmoco
from mocosfl_jax.algorithm.interface import Algorithm
from mocosfl_jax.algorithm.moco import MomentumContrast
from mocosfl_jax.algorithm.mocosfl import mocosfl
from mocosfl_jax.config import Resolved
from mocosfl_jax.models import SplitModel, split_model
from mocosfl_jax.models.forms import ACCELERATOR, Forms
from mocosfl_jax.parallel import exchange, state


def build(
    config: Resolved,
    mesh: Mesh,
    forms: Forms,
    *,
    image_size: int,
    steps_per_epoch: int = 1,
    batch_sizes: list[int] | None = None,
    images: list[int] | None = None,
) -> tuple[SplitModel, Algorithm]:
    """The network and the algorithm of a configuration, without its data.

    Args:
      config: what to build.
      mesh: over which the algorithm's states are placed.
      forms: of the mesh's platform.
      image_size: pixels a side.
      steps_per_epoch: for the schedules; does not matter where nothing is trained.
      batch_sizes: [M], of each place in the cohort; None: all are alike, or nothing is trained.
      images: [N], of each client, for weighted averages; None: nothing is trained.
    """
    model = build_model(config, image_size, forms)
    placement = exchange.make_placement(mesh, forms)
    optimizer = optim.sgd(config.optim.momentum, config.optim.weight_decay)
    server_lr, client_lr = learning_rates(config, steps_per_epoch)
    moco = MomentumContrast(
        queue_size=config.moco.queue_size,
        temperature=config.moco.temperature,
        momentum=config.moco.momentum,
        symmetric=config.moco.symmetric,
        full_symmetric=config.moco.full_symmetric,
        feature_sharing=config.moco.feature_sharing,
    )
    sync = Sync(
        weights=np.array(images, np.float32) if config.sync.weighted else None,
        momentum_models=config.sync.momentum_models,
        buffers=config.sync.buffers,
        divergence_lambda=config.sync.divergence_lambda,
    )
    if config.algorithm == "flmoco":
        algorithm = flmoco(
            model,
            num_clients=config.clients.num,
            moco=moco,
            optimizer=optimizer,
            lr=client_lr,
            sync=sync,
            placement=placement,
        )
    else:
        algorithm = mocosfl(
            model,
            num_clients=config.clients.num,
            batch_sizes=batch_sizes,
            moco=moco,
            optimizer=optimizer,
            server_lr=server_lr,
            client_lr=client_lr,
            sync=sync,
            placement=placement,
        )
    return model, state.distribute(algorithm, mesh, config.clients.num)


def learning_rates(config: Resolved, steps_per_epoch: int) -> tuple[optim.Schedule, optim.Schedule | float]:
    """The server's and the clients' learning rates over training steps; 0.0 for frozen clients."""
    settings, epochs = config.optim, config.total_epochs
    server_lr = optim.schedule(
        settings.schedule, settings.server_lr, epochs=epochs, steps_per_epoch=steps_per_epoch
    )
    if settings.client_lr == 0:
        return server_lr, 0.0  # frozen, which no schedule can say
    name, steps_per_decay = settings.client_schedule, steps_per_epoch
    if name == "official_per_step":
        name, steps_per_decay = settings.schedule, 1
    client_lr = optim.schedule(
        name, settings.client_lr, epochs=epochs, steps_per_epoch=steps_per_decay, decay=0.2
    )
    return server_lr, client_lr


def network_arguments(config: Resolved, image_size: int) -> dict[str, Any]:
    """The arguments of `split_model` that describe the network of a configuration."""
    model, moco = config.model, config.moco
    return {
        "name": model.name,
        "cut_layer": model.cut_layer,
        "width": model.width,
        "image_size": image_size,
        "stem_stride": model.stem_stride,
        "key_dim": moco.key_dim,
        "head": moco.head,
        "bottleneck": model.bottleneck,
        "client_residual": model.client_residual,
        "weight_standardisation": model.weight_standardisation,
        "norm": model.norm,
        "compute_dtype": model.compute_dtype,
    }


def build_model(config: Resolved, image_size: int, forms: Forms = ACCELERATOR) -> SplitModel:
    """The network of a configuration, for images of `image_size` pixels a side."""
    stacked_server = config.algorithm == "flmoco"
    return split_model(**network_arguments(config, image_size), stacked_server=stacked_server, forms=forms)
