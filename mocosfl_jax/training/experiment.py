"""Prepares an experiment: reads the data, divides it among the clients and builds the algorithm."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from mocosfl_jax import data
from mocosfl_jax.algorithm.interface import Algorithm
from mocosfl_jax.algorithm.messages import Views
from mocosfl_jax.config import Own, Resolved
from mocosfl_jax.data.fingerprint import Fingerprint, fingerprint
from mocosfl_jax.errors import UserError, renamed
from mocosfl_jax.feed import augment, batches, partition
from mocosfl_jax.feed.partition import Rich
from mocosfl_jax.models import SplitModel, check_independence, check_model
from mocosfl_jax.models import forms as platforms
from mocosfl_jax.models.decoders import read_family
from mocosfl_jax.models.forms import Forms
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.privacy.inversion import FEWEST_IMAGES
from mocosfl_jax.runtime import hosts
from mocosfl_jax.training import saving, workdir
from mocosfl_jax.training.build import FIELDS, RESIST_FIELDS, MakeAlgorithm, build, constant_network
from mocosfl_jax.training.rounds import MakeViews
from mocosfl_jax.training.source import Source, load_source, share_of

# What the user gave, by the argument of the functions that check it.
_FIELDS = {
    "num_clients": "config.clients.num",
    "num_clients and batch_size": "config.clients.num and config.clients.batch_size",
    "batch_size": "config.clients.batch_size",
    "cohort": "config.clients.cohort",
    "noniid_ratio": "config.clients.noniid_ratio",
    "dirichlet_alpha": "config.clients.dirichlet_alpha",
    "seed": "config.seed",
    "queue_size": "config.moco.queue_size",
}
_DATA_FIELDS = {
    "name": "config.data.name",
    "directory": "config.data.dir",
    "image_size": "config.data.image_size",
    "max_broken": "config.data.max_broken",
    "resident": "config.data.resident",
}


class Loaded(NamedTuple):
    """The data set of a run, from `load`."""

    dataset: data.Dataset
    residence: batches.Residence  # where the training images are kept
    fingerprint: Fingerprint


class Run(NamedTuple):
    """The parts of a run that do not change during training."""

    config: Resolved
    dataset: data.Dataset
    fingerprint: Fingerprint  # of the data set
    residence: batches.Residence  # where the training images are kept
    parts: list[np.ndarray]  # indices of each client's images
    rich: Rich | None  # None: all clients are equal
    batch_sizes: np.ndarray  # [N], images per step of each client
    model: SplitModel
    algorithm: Algorithm
    make_views: MakeViews
    cohort: int  # M
    images_per_step: int
    steps_per_epoch: int
    steps_per_round: int  # a round ends with a synchronization
    mesh: Mesh  # holds the states of `algorithm`
    forms: Forms  # for the platform of the mesh
    source: Source | None = None  # None: all images are the data set's
    simulated: bool = True  # False: clients hold their images themselves, so only their numbers are known

    @property
    def views(self) -> data.Images:
        """The images [n, H, W, 3] uint8 from which `make_views` draws views."""
        return views_of(self.dataset) if self.source is None else self.source.images

    @property
    def total_steps(self) -> int:
        """Training steps of the whole run."""
        return self.config.total_epochs * self.steps_per_epoch

    @property
    def whole_pool(self) -> bool:
        """Whether every client takes part in every step."""
        return self.cohort == self.config.clients.num

    @property
    def smashed(self) -> jax.ShapeDtypeStruct:
        """Shape [n, h, w, c] and dtype of the concatenated smashed data of one kind of view in a step."""
        size, channels = self.dataset.x_train.shape[2:]
        rows = self.images_per_step * (2 if self.config.moco.full_symmetric else 1)
        images = jax.ShapeDtypeStruct((rows, size, size, channels), np.float32)
        client_params, _ = jax.eval_shape(self.model.init, jax.random.key(0))
        return jax.eval_shape(self.model.client, client_params, images)

    @property
    def gradients_return(self) -> bool:
        """Whether clients need the gradients of their smashed data: they have parameters and train them."""
        client_params, _ = jax.eval_shape(self.model.init, jax.random.key(0))
        return self.config.optim.client_lr > 0 and bool(jax.tree.leaves(client_params))

    @property
    def replay(self) -> jax.ShapeDtypeStruct:
        """Shape [S, 2, n, h, w, c] and dtype of an epoch's smashed data, of query and key views."""
        one = self.smashed
        return jax.ShapeDtypeStruct((self.steps_per_epoch, 2, *one.shape), one.dtype)

    def members(self, epoch: int) -> np.ndarray:
        """Return the cohort of an epoch: [M] int32, sorted, so that rich clients come first."""
        pool, seed = self.config.clients, self.config.seed
        return partition.sample_cohort(pool.num, self.cohort, seed=seed, epoch=epoch, rich=self.rich)

    def indices(self, epoch: int) -> np.ndarray:
        """Return the images of an epoch: [S, M, B] int32, as dealt by `partition.epoch_indices`."""
        if self.source is not None:
            seed, steps = self.config.seed, self.steps_per_epoch
            return self.source.indices(self.images_per_step, steps=steps, seed=seed, epoch=epoch)
        return partition.epoch_indices(
            self.parts,
            self.members(epoch),
            batch_sizes=self.batch_sizes,
            steps=self.steps_per_epoch,
            seed=self.config.seed,
            epoch=epoch,
        )


def views_of(dataset: data.Dataset) -> data.Images:
    """Return the training images from which views are drawn: the whole ones if they were resized."""
    return dataset.x_train if dataset.whole is None else dataset.whole


def prepare(
    config: Resolved,
    mesh: Mesh,
    forms: Forms | None = None,
    *,
    model: SplitModel | None = None,
    algorithm: MakeAlgorithm | None = None,
    preprocessing: workdir.Preprocessing | None = None,
    loaded: Loaded | None = None,
) -> Run:
    """Read the data, divide it among the clients and build the algorithm. Nothing is compiled.

    Args:
      config: the resolved configuration. The sizes in `config.mesh` are ignored, since a run can be resumed
        and evaluated on any number of devices.
      mesh: the mesh to train on.
      forms: the forms of the program; None: the fast ones for the mesh's platform.
      model: a network of your own; None: that of the configuration.
      algorithm: a function like `config.own.algorithm`; None: that of the configuration.
      preprocessing: of the run that goes on; None: a new run, with mean and standard deviation of the data.
      loaded: the data, if they were read before.

    Returns:
      The run.

    Raises:
      UserError: if a part of the configuration or the data is impossible.
    """
    own = Own(
        network=config.own.network if model is None else constant_network(model),
        algorithm=algorithm or config.own.algorithm,
    )
    config = dataclasses.replace(config, own=own)
    check(config, mesh)
    dataset, residence, data_fingerprint = loaded or load(config, mesh, preprocessing)
    if config.resist.strength and len(dataset.y_train) < FEWEST_IMAGES:
        raise UserError(
            f"config.resist.strength: found {config.resist.strength:g} and {len(dataset.y_train)} training "
            f"images, allowed: 0, or {FEWEST_IMAGES} images or more for the decoder that judges the clients"
        )
    pool = config.clients
    with renamed(_FIELDS):
        parts = partition.partition(
            dataset.y_train,
            num_clients=pool.num,
            batch_size=pool.batch_size,
            noniid_ratio=pool.noniid_ratio,
            dirichlet_alpha=pool.dirichlet_alpha,
            seed=pool.seed,
            rich=_rich(config),
        )
    source = None
    if config.resist.target_share < 1:
        parts = [share_of(parts[0], config.resist.target_share, pool.seed)]
        _check_share(config, len(parts[0]), len(dataset.y_train))
    if config.resist.source is not None:
        source, of_source = load_source(config, dataset, parts[0])
        data_fingerprint = {**data_fingerprint, **of_source}
        residence = _residence(config, mesh, source.images.size)
    run = assemble(config, mesh, forms, dataset, parts, residence, data_fingerprint, source)
    if own.network is not None:
        height, width, channels = dataset.x_train.shape[1:]
        check_independence(run.model, (height, width, channels))
    if own.algorithm is not None:
        with renamed({"moco.queue_size": "config.moco.queue_size"}):
            _trace(run)
    _check_saving(run)
    return run


def assemble(
    config: Resolved,
    mesh: Mesh,
    forms: Forms | None,
    dataset: data.Dataset,
    parts: list[np.ndarray],
    residence: batches.Residence,
    data_fingerprint: Fingerprint,
    source: Source | None = None,
) -> Run:
    """Build the algorithm for data that are loaded and divided among the clients.

    Args:
      config: the resolved configuration.
      mesh: the mesh to train on.
      forms: the forms of the program; None: the fast ones for the mesh's platform.
      dataset: only the shape of its images matters here.
      parts: indices of each client's images; only their numbers matter here.
      residence: where the training images are kept.
      data_fingerprint: of the data set.
      source: a second data set, from which half the images come.

    Raises:
      UserError: if the queue is smaller than the keys of a step.
    """
    forms = forms or platforms.forms(meshes.platform(mesh))
    pool, rich = config.clients, _rich(config)
    batch_sizes = partition.batch_sizes(pool.num, pool.batch_size, rich)
    # These hold for every cohort: rich clients come first, and their number is always the same.
    places = batch_sizes[partition.sample_cohort(pool.num, pool.cohort, seed=config.seed, epoch=0, rich=rich)]
    _check_queue(config, places, rich)
    steps = pool.local_epochs * partition.steps_per_epoch(parts, batch_sizes)
    if source is not None:
        steps = source.steps_per_epoch(pool.batch_size)
    size = dataset.x_train.shape[1]
    model, algorithm = build(
        config,
        mesh,
        forms,
        image_size=size,
        steps_per_epoch=steps,
        batch_sizes=places.tolist() if rich else None,
        images=[len(part) for part in parts],
        statistics=(dataset.mean, dataset.std),
    )
    make_views: MakeViews = partial(
        augment.two_views if dataset.whole is None else augment.two_views_of_canvases,
        size=size,
        version=config.moco.augmentation,
        min_crop_scale=config.moco.min_crop_scale,
        mean=dataset.mean,
        std=dataset.std,
    )
    if source is not None and (source.mean, source.std) != (dataset.mean, dataset.std):
        make_views = _then(make_views, partial(source.renormalise, mean=dataset.mean, std=dataset.std))
    return Run(
        config=config,
        dataset=dataset,
        fingerprint=data_fingerprint,
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
        forms=forms,
        source=source,
    )


def of_real_clients(config: Resolved, mesh: Mesh, loaded: Loaded, images: Mapping[int, int]) -> Run:
    """The run of clients that hold their images elsewhere.

    Args:
      config: the resolved configuration.
      mesh: of the server.
      loaded: the server's own data set.
      images: how many each of the N clients holds.
    """
    parts = [np.arange(images[client]) for client in range(config.clients.num)]
    dataset = loaded.dataset._replace(whole=None)  # clients resize their pictures themselves
    run = assemble(config, mesh, None, dataset, parts, loaded.residence, loaded.fingerprint)
    return run._replace(simulated=False)


def of_workdir(config: Resolved, mesh: Mesh, folder: Path, *, accept_other_data: bool = False) -> Run:
    """The run that trained in a workdir, with simulated or with real clients; see `prepare`.

    Raises:
      UserError: if the data have changed since, unless that is accepted.
    """
    preprocessing = workdir.read_preprocessing(folder) if workdir.has_preprocessing(folder) else None
    check(config, mesh)
    loaded = load(config, mesh, preprocessing)
    if not accept_other_data:  # before the images are divided, which other data may not allow
        workdir.require_same_data(folder, loaded.fingerprint)
    if images := workdir.read_clients(folder, config):
        return of_real_clients(config, mesh, loaded, images)
    run = prepare(config, mesh, preprocessing=preprocessing, loaded=loaded)
    if not accept_other_data:  # a source of further images too
        workdir.require_same_data(folder, run.fingerprint)
    return run


def _then(make_views: MakeViews, change: Callable[[Views], Views]) -> MakeViews:
    def changed(rng: Array, images: Array) -> Views:
        return change(make_views(rng, images))

    return changed


def _trace(run: Run) -> None:
    """Trace a round of an algorithm of your own, so that what it refuses is refused before any work."""
    algorithm, rng = run.algorithm, jax.random.key(0)
    members = None if run.whole_pool else jax.ShapeDtypeStruct((run.cohort,), np.int32)
    images = (run.cohort, int(run.batch_sizes.max()), *run.views.shape[1:])
    views = jax.eval_shape(run.make_views, rng, jax.ShapeDtypeStruct(images, np.uint8))
    state = jax.eval_shape(algorithm.enter, jax.eval_shape(algorithm.init, rng), members)
    state, _ = jax.eval_shape(algorithm.step, state, views)
    jax.eval_shape(algorithm.sync, state)


def _check_share(config: Resolved, images: int, of: int) -> None:
    """Raise UserError if a share of the target has fewer images than a step takes from it."""
    share, batch = config.resist.target_share, config.clients.batch_size
    if config.resist.source is not None:
        batch = batch // 2 if share else 0
    if images < batch:
        raise UserError(
            f"config.resist.target_share: found {share:g}, {images:,} of {of:,} images, allowed: "
            f"{batch:,} images or more, which a step takes"
        )


def _rich(config: Resolved) -> Rich | None:
    pool = config.clients
    return Rich(max(1, round(pool.rich * pool.num)), pool.rich_data, pool.rich_batch) if pool.rich else None


def check(config: Resolved, mesh: Mesh) -> None:
    """Raise UserError for an impossible network or queue, before the data is read."""
    if config.own.network is None:
        with renamed(FIELDS):
            check_model(
                config.model.name,
                cut_layer=config.model.cut_layer,
                width=config.model.width,
                stem_stride=config.model.stem_stride,
                bottleneck=config.model.bottleneck,
                norm=config.model.norm,
                init=config.model.init,
                compute_dtype=config.model.compute_dtype,
                head=config.moco.head,
            )
    if config.resist.strength:
        with renamed(RESIST_FIELDS):
            read_family(config.resist.decoder)
    if config.algorithm == "mocosfl" and config.moco.feature_sharing:
        with renamed(_FIELDS):
            meshes.check_queue(mesh, config.moco.queue_size)


def load(config: Resolved, mesh: Mesh, preprocessing: workdir.Preprocessing | None = None) -> Loaded:
    """Load the data set, with its training images in memory if they will be resident on the device.

    With `preprocessing`, its images have that size, mean and standard deviation instead of their own.
    """
    read = partial(data.load, config.data.name, config.data.dir, max_broken=config.data.max_broken)
    with renamed(_DATA_FIELDS):
        dataset = read(image_size=config.data.image_size)
        if preprocessing is not None and dataset.x_train.shape[1:3] != (preprocessing.image_size,) * 2:
            dataset = read(image_size=preprocessing.image_size)
    height, width = dataset.x_train.shape[1:3]
    if height != width:
        raise UserError(f"config.data.image_size: found None and images of {height}x{width}, allowed: a size")
    residence = _residence(config, mesh, math.prod(views_of(dataset).shape))
    # Before all images are read into memory, so that it does not depend on where they are kept.
    data_fingerprint = fingerprint(dataset)
    with renamed(_DATA_FIELDS):
        dataset = data.in_memory(dataset) if residence.resident else dataset
    if preprocessing is not None:
        dataset = dataset._replace(mean=preprocessing.mean, std=preprocessing.std)
    return Loaded(dataset, residence, data_fingerprint)


def _residence(config: Resolved, mesh: Mesh, size: int) -> batches.Residence:
    """Where training images of so many bytes are kept."""
    memory = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    with renamed(_DATA_FIELDS):
        return batches.residence(config.data.resident, size, memory, copies=len(mesh.local_devices))


def _check_queue(config: Resolved, places: np.ndarray, rich: Rich | None) -> None:
    """Raise UserError if the queue is smaller than the keys of a step with rich clients.

    For equal clients, this is checked when the configuration is resolved, and for an algorithm of your own by
    tracing it, since it need not have a queue.
    """
    moco = config.moco
    keys = int(places.sum()) * (2 if moco.symmetric or moco.full_symmetric else 1)
    if rich and config.own.algorithm is None and moco.feature_sharing and moco.queue_size < keys:
        raise UserError(
            f"config.moco.queue_size: found {moco.queue_size}, allowed: {keys} or more (the keys of one step)"
        )


def _check_saving(run: Run) -> None:
    """Raise UserError if the smashed data of an epoch cannot be kept for a replay."""
    settings = run.config.saving
    if not settings.loss_threshold:
        return
    if run.algorithm.replay is None:
        raise UserError(
            f"config.saving.loss_threshold: found {settings.loss_threshold:g}, allowed: 0 with an algorithm "
            "that cannot replay smashed data"
        )
    if hosts.several():
        raise UserError(
            f"config.saving.loss_threshold: found {settings.loss_threshold:g}, allowed: 0 with several "
            "processes"
        )
    needed = saving.gibibytes(run.replay)
    if needed > settings.replay_gib:
        raise UserError(
            f"config.saving.replay_gib: found {settings.replay_gib:g}, allowed: {needed:.3g} or more "
            "(the smashed data of one epoch)"
        )
