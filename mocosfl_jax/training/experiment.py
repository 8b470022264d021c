"""An experiment made ready: data read, dealt to the clients, algorithm built."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mocosfl_jax import data
from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.clients import Sync
from mocosfl_jax.algorithm.flmoco import flmoco
from mocosfl_jax.algorithm.interface import Algorithm
from mocosfl_jax.algorithm.mocosfl import mocosfl
from mocosfl_jax.config import Config
from mocosfl_jax.errors import UserError
from mocosfl_jax.feed import augment, batches, partition
from mocosfl_jax.feed.partition import Rich
from mocosfl_jax.models import SplitModel, check_model, split_model
from mocosfl_jax.models.convolution import Lowering
from mocosfl_jax.parallel import sharding
from mocosfl_jax.runtime import hosts
from mocosfl_jax.training import saving
from mocosfl_jax.training.rounds import MakeViews


class Run(NamedTuple):
    """What does not change while a run trains."""

    config: Config  # resolved
    dataset: data.Dataset
    residence: batches.Residence  # of the training images
    parts: list[np.ndarray]  # indices of each client's images
    rich: Rich | None  # None: all clients are alike
    batch_sizes: np.ndarray  # [N], images of each client in a step
    model: SplitModel
    algorithm: Algorithm
    make_views: MakeViews
    cohort: int  # M
    images_per_step: int
    steps_per_epoch: int
    steps_per_round: int  # a round ends with a synchronization
    mesh: Mesh | None = None  # over which the states of `algorithm` are placed; None: one device

    @property
    def total_steps(self) -> int:
        return self.config.total_epochs * self.steps_per_epoch

    @property
    def whole_pool(self) -> bool:
        """Every client takes part in every step."""
        return self.cohort == self.config.clients.num

    @property
    def smashed(self) -> jax.ShapeDtypeStruct:
        """Shape [n, h, w, c] and dtype of the smashed data of one kind of view that a step concatenates."""
        size, channels = self.dataset.x_train.shape[2:]
        rows = self.images_per_step * (2 if self.config.moco.full_symmetric else 1)
        images = jax.ShapeDtypeStruct((rows, size, size, channels), np.float32)
        client_params, _ = jax.eval_shape(self.model.init, jax.random.key(0))
        return jax.eval_shape(self.model.client, client_params, images)

    @property
    def replay(self) -> jax.ShapeDtypeStruct:
        """Shape [S, 2, n, h, w, c] and dtype of the smashed data of an epoch, of query and key views."""
        one = self.smashed
        return jax.ShapeDtypeStruct((self.steps_per_epoch, 2, *one.shape), one.dtype)

    def members(self, epoch: int) -> np.ndarray:
        """The cohort of an epoch: [M] int32, sorted, so that rich clients come first."""
        pool, seed = self.config.clients, self.config.seed
        return partition.sample_cohort(pool.num, self.cohort, seed=seed, epoch=epoch, rich=self.rich)

    def indices(self, epoch: int) -> np.ndarray:
        """The images of an epoch, [S, M, B] int32, as `partition.epoch_indices` deals them."""
        return partition.epoch_indices(
            self.parts,
            self.members(epoch),
            batch_sizes=self.batch_sizes,
            steps=self.steps_per_epoch,
            seed=self.config.seed,
            epoch=epoch,
        )


def prepare(config: Config, mesh: Mesh | None = None) -> Run:
    """Read the data, deal it to the clients and build the algorithm. Nothing is compiled.

    Args:
      config: not resolved yet, or already.
      mesh: of `sharding.make_mesh`, for training on it. The sizes in `config.mesh` are not looked at, since
        a run goes on, and is evaluated, on any number of devices.

    Raises:
      UserError: for whatever in the configuration or the data cannot be.
    """
    config = config.resolved()
    pool, moco = config.clients, config.moco
    assert pool.cohort is not None and pool.batch_size is not None and config.sync.frequency is not None
    assert moco.augmentation is not None and moco.head is not None
    check_model(
        config.model.name,
        cut_layer=config.model.cut_layer,
        width=config.model.width,
        stem_stride=config.model.stem_stride,
        bottleneck=config.model.bottleneck,
        norm=config.model.norm,
        compute_dtype=config.model.compute_dtype,
        head=moco.head,
    )
    if config.algorithm == "mocosfl" and moco.feature_sharing:
        sharding.check_queue(mesh, moco.queue_size)
    rich = None
    if pool.rich:
        rich = Rich(max(1, round(pool.rich * pool.num)), pool.rich_data, pool.rich_batch)
    batch_sizes = partition.batch_sizes(pool.num, pool.batch_size, rich)
    dataset = data.load(
        config.data.name, config.data.dir, config.data.image_size, max_broken=config.data.max_broken
    )
    residence = batches.residence(config.data.resident, math.prod(dataset.x_train.shape))
    if residence.resident:
        dataset = data.in_memory(dataset)
    height, width = dataset.x_train.shape[1:3]
    if height != width:
        raise UserError(f"config.data.image_size: found None and images of {height}x{width}, allowed: a size")
    parts = partition.partition(
        dataset.y_train,
        num_clients=pool.num,
        batch_size=pool.batch_size,
        noniid_ratio=pool.noniid_ratio,
        dirichlet_alpha=pool.dirichlet_alpha,
        seed=config.seed,
        rich=rich,
    )
    steps = pool.local_epochs * partition.steps_per_epoch(parts, batch_sizes)
    # The batch sizes of every cohort: the rich come first, and there are always as many of them.
    places = batch_sizes[partition.sample_cohort(pool.num, pool.cohort, seed=config.seed, epoch=0, rich=rich)]
    keys = int(places.sum()) * (2 if moco.symmetric or moco.full_symmetric else 1)
    if rich and moco.feature_sharing and moco.queue_size < keys:
        raise UserError(
            f"config.moco.queue_size: found {moco.queue_size}, allowed: {keys} or more (the keys of one step)"
        )
    model, algorithm = build(
        config,
        image_size=height,
        steps_per_epoch=steps,
        batch_sizes=places.tolist() if rich else None,
        images=[len(part) for part in parts],
        mesh=mesh,
    )
    make_views = partial(
        augment.two_views,
        size=height,
        version=moco.augmentation,
        min_crop_scale=moco.min_crop_scale,
        mean=dataset.mean,
        std=dataset.std,
    )
    run = Run(
        config=config,
        dataset=dataset,
        residence=residence,
        parts=parts,
        rich=rich,
        batch_sizes=batch_sizes,
        model=model,
        algorithm=algorithm,
        make_views=make_views,
        cohort=pool.cohort,
        images_per_step=int(places.sum()),
        steps_per_epoch=steps,
        steps_per_round=max(1, steps // config.sync.frequency),
        mesh=mesh,
    )
    if config.saving.loss_threshold:
        if hosts.several():
            raise UserError(
                f"config.saving.loss_threshold: found {config.saving.loss_threshold:g}, allowed: 0 with "
                "several processes"
            )
        needed, limit = saving.gibibytes(run.replay), config.saving.replay_gib
        if needed > limit:
            raise UserError(
                f"config.saving.replay_gib: found {limit:g}, allowed: {needed:.3g} or more "
                "(the smashed data of one epoch)"
            )
    return run


def build(
    config: Config,
    *,
    image_size: int,
    steps_per_epoch: int = 1,
    batch_sizes: list[int] | None = None,
    images: list[int] | None = None,
    mesh: Mesh | None = None,
) -> tuple[SplitModel, Algorithm]:
    """The network and the algorithm of a resolved configuration, without its data.

    Args:
      config: resolved.
      image_size: pixels a side.
      steps_per_epoch: for the schedules; does not matter where nothing is trained.
      batch_sizes: [M], of each place in the cohort; None: all are alike, or nothing is trained.
      images: [N], of each client, for weighted averages; None: nothing is trained.
      mesh: over which the algorithm's states are placed; None: on one device.
    """
    placement = sharding.make_placement(mesh)
    model = build_model(config, image_size)
    moco, optimizer, sync = config.moco, config.optim, config.sync
    assert moco.symmetric is not None and optimizer.schedule is not None
    assert optimizer.client_lr is not None and optimizer.client_schedule is not None
    epochs = config.total_epochs
    client_schedule, steps_per_decay = optimizer.client_schedule, steps_per_epoch
    if client_schedule == "official_per_step":
        client_schedule, steps_per_decay = optimizer.schedule, 1
    client_lr: optim.Schedule | float = optim.schedule(
        client_schedule, optimizer.client_lr, epochs=epochs, steps_per_epoch=steps_per_decay, decay=0.2
    )
    if optimizer.client_lr == 0:
        client_lr = 0.0  # frozen, which no schedule can say
    weights = np.array(images, np.float32) if sync.weighted else None
    how = Sync(weights, sync.momentum_models, sync.buffers, sync.divergence_lambda)
    if config.algorithm == "flmoco":
        algorithm = flmoco(
            model,
            num_clients=config.clients.num,
            lr=client_lr,
            sgd_momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            queue_size=moco.queue_size,
            temperature=moco.temperature,
            momentum=moco.momentum,
            symmetric=moco.symmetric,
            sync=how,
            placement=placement,
        )
    else:
        algorithm = mocosfl(
            model,
            num_clients=config.clients.num,
            batch_sizes=batch_sizes,
            server_lr=optim.schedule(
                optimizer.schedule, optimizer.server_lr, epochs=epochs, steps_per_epoch=steps_per_epoch
            ),
            client_lr=client_lr,
            sgd_momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            queue_size=moco.queue_size,
            temperature=moco.temperature,
            momentum=moco.momentum,
            symmetric=moco.symmetric,
            full_symmetric=moco.full_symmetric,
            feature_sharing=moco.feature_sharing,
            sync=how,
            placement=placement,
        )
    return model, sharding.distribute(algorithm, mesh, config.clients.num)


def network(config: Config, image_size: int) -> dict[str, Any]:
    """The arguments of `split_model` that describe the network of a resolved configuration."""
    model, moco = config.model, config.moco
    assert moco.key_dim is not None and moco.head is not None
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


def build_model(config: Config, image_size: int, convolutions: Lowering | None = None) -> SplitModel:
    """The network of a resolved configuration, for images of `image_size` pixels a side.

    `convolutions` as in `split_model`.
    """
    stacked_server = config.algorithm == "flmoco"
    return split_model(
        **network(config, image_size), stacked_server=stacked_server, convolutions=convolutions
    )
