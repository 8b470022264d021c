"""An experiment made ready: data read, dealt to the clients, algorithm built."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from mocosfl_jax import augment, clients, data, optim, partition
from mocosfl_jax.config import Config
from mocosfl_jax.errors import UserError
from mocosfl_jax.flmoco import flmoco
from mocosfl_jax.mocosfl import Algorithm, mocosfl
from mocosfl_jax.models import SplitModel, check_model, split_model
from mocosfl_jax.partition import Rich
from mocosfl_jax.rounds import MakeViews


class Run(NamedTuple):
    """What does not change while a run trains."""

    config: Config  # resolved
    dataset: data.Dataset
    parts: list[np.ndarray]  # indices of each client's images
    rich: Rich | None  # None: all clients are alike
    batch_sizes: np.ndarray  # [M], images of each place in the cohort
    model: SplitModel
    algorithm: Algorithm
    make_views: MakeViews
    steps_per_epoch: int
    steps_per_round: int  # a round ends with a synchronization

    @property
    def cohort(self) -> int:
        """M."""
        return len(self.batch_sizes)

    @property
    def total_steps(self) -> int:
        return self.config.total_epochs * self.steps_per_epoch

    @property
    def images_per_step(self) -> int:
        return int(self.batch_sizes.sum())

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
    pool, model_config, moco = config.clients, config.model, config.moco
    assert pool.cohort is not None and pool.batch_size is not None and config.sync.frequency is not None
    assert moco.key_dim is not None and moco.head is not None and moco.augmentation is not None
    check_model(model_config.name, cut_layer=model_config.cut_layer, width=model_config.width)
    dataset = data.load(config.data.name, config.data.dir, config.data.image_size)
    height, width = dataset.x_train.shape[1:3]
    if height != width:
        raise UserError(f"config.data.image_size: found None and images of {height}x{width}, allowed: a size")
    rich = None
    if pool.rich:
        rich = Rich(max(1, round(pool.rich * pool.num)), pool.rich_data, pool.rich_batch)
    parts = partition.partition(
        dataset.y_train,
        num_clients=pool.num,
        batch_size=pool.batch_size,
        noniid_ratio=pool.noniid_ratio,
        dirichlet_alpha=pool.dirichlet_alpha,
        seed=config.seed,
        rich=rich,
    )
    batch_sizes = partition.batch_sizes(pool.num, pool.batch_size, rich)
    steps = pool.local_epochs * partition.steps_per_epoch(parts, batch_sizes)
    # The same for every cohort: the rich come first, and there are always as many of them.
    first_cohort = partition.sample_cohort(pool.num, pool.cohort, seed=config.seed, epoch=0, rich=rich)
    model = split_model(
        model_config.name,
        cut_layer=model_config.cut_layer,
        width=model_config.width,
        image_size=height,
        stem_stride=model_config.stem_stride,
        key_dim=moco.key_dim,
        head=moco.head,
    )
    run = Run(
        config=config,
        dataset=dataset,
        parts=parts,
        rich=rich,
        batch_sizes=batch_sizes[first_cohort],
        model=model,
        algorithm=None,
        make_views=partial(
            augment.two_views,
            size=height,
            version=moco.augmentation,
            min_crop_scale=moco.min_crop_scale,
            mean=dataset.mean,
            std=dataset.std,
        ),
        steps_per_epoch=steps,
        steps_per_round=max(1, steps // config.sync.frequency),
    )
