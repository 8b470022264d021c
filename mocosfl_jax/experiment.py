"""An experiment made ready: data read, dealt to the clients, algorithm built."""

from functools import partial
from typing import NamedTuple

import numpy as np

from mocosfl_jax import augment, data, optim, partition
from mocosfl_jax.config import Config
from mocosfl_jax.errors import UserError
from mocosfl_jax.mocosfl import Algorithm, mocosfl
from mocosfl_jax.models import SplitModel, check_model, split_model
from mocosfl_jax.rounds import MakeViews


class Run(NamedTuple):
    """What does not change while a run trains."""

    config: Config  # resolved
    dataset: data.Dataset
    parts: list[np.ndarray]  # indices of each client's images
    model: SplitModel
    algorithm: Algorithm
    make_views: MakeViews
    cohort: int  # M
    steps_per_epoch: int
    steps_per_round: int  # a round ends with a synchronization

    @property
    def total_steps(self) -> int:
        return self.config.total_epochs * self.steps_per_epoch

    @property
    def images_per_step(self) -> int:
        return self.cohort * self.config.clients.batch_size

    @property
    def whole_pool(self) -> bool:
        """Every client takes part in every step."""
        return self.cohort == self.config.clients.num


def prepare(config: Config) -> Run:
    """Read the data, deal it to the clients and build the algorithm. Nothing is compiled.

    Raises:
      UserError: for whatever in the configuration or the data cannot be.
    """
    config = config.resolved()
    clients, moco = config.clients, config.moco
    assert clients.cohort is not None and moco.augmentation is not None
    check_model(config.model.name, cut_layer=config.model.cut_layer, width=config.model.width)
    dataset = data.load(config.data.name, config.data.dir, config.data.image_size)
    height, width = dataset.x_train.shape[1:3]
    if height != width:
        raise UserError(f"config.data.image_size: found None and images of {height}x{width}, allowed: a size")
    parts = partition.partition(
        dataset.y_train,
        num_clients=clients.num,
        batch_size=clients.batch_size,
        noniid_ratio=clients.noniid_ratio,
        dirichlet_alpha=clients.dirichlet_alpha,
        seed=config.seed,
    )
    steps = partition.steps_per_epoch(parts, clients.batch_size)
    model, algorithm = build(config, image_size=height, steps_per_epoch=steps)
    make_views = partial(
        augment.two_views,
        size=height,
        version=moco.augmentation,
        min_crop_scale=moco.min_crop_scale,
        mean=dataset.mean,
        std=dataset.std,
    )
    return Run(
        config=config,
        dataset=dataset,
        parts=parts,
        model=model,
        algorithm=algorithm,
        make_views=make_views,
        cohort=clients.cohort,
        steps_per_epoch=steps,
        steps_per_round=max(1, steps // clients.sync_frequency),
    )


def build(config: Config, *, image_size: int, steps_per_epoch: int) -> tuple[SplitModel, Algorithm]:
    """The network and the algorithm of a resolved configuration, without its data."""
    clients, moco = config.clients, config.moco
    assert moco.key_dim is not None and moco.mlp is not None and moco.symmetric is not None
    assert config.optim.schedule is not None
    model = split_model(
        config.model.name,
        cut_layer=config.model.cut_layer,
        width=config.model.width,
        image_size=image_size,
        stem_stride=config.model.stem_stride,
        key_dim=moco.key_dim,
        mlp=moco.mlp,
    )
    schedule = partial(
        optim.schedule, config.optim.schedule, epochs=config.total_epochs, steps_per_epoch=steps_per_epoch
    )
    algorithm = mocosfl(
        model,
        num_clients=clients.num,
        server_lr=schedule(config.optim.server_lr, decay=0.1),
        client_lr=schedule(config.optim.client_lr, decay=0.2),
        sgd_momentum=config.optim.momentum,
        weight_decay=config.optim.weight_decay,
        queue_size=moco.queue_size,
        temperature=moco.temperature,
        momentum=moco.momentum,
        symmetric=moco.symmetric,
    )
    return model, algorithm
