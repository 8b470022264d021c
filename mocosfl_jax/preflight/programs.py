"""The programs of a run, for a mesh of devices that are not here and data that are not read."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from mocosfl_jax import data
from mocosfl_jax.config import Resolved
from mocosfl_jax.data import Dataset, canvas
from mocosfl_jax.errors import UserError
from mocosfl_jax.evaluation import knn
from mocosfl_jax.evaluation.features import BATCH, make_encode
from mocosfl_jax.feed import batches
from mocosfl_jax.models import Features
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.parallel import state as states
from mocosfl_jax.training import experiment, programs
from mocosfl_jax.training.experiment import Run

NAMES = ("init", "enter", "round", "sync", "leave", "encode", "knn")
CLASSES = 10  # their number hardly matters
TEST_IMAGES = 10_000


class Plan(NamedTuple):
    """A program to be compiled."""

    name: str
    lower: Callable[[], Any]
    trace: Callable[[], Any]  # its jaxpr
    arguments: int  # bytes on each device, as the program's arrays have them
    images: int  # bytes of images on each device while it runs
    elsewhere: int  # bytes on each device that it neither reads nor writes: images, and the state in kNN
    steps: int = 1  # training steps of a call


def describe(
    config: Resolved, mesh: Mesh, memory: int, images: int | None = None, image_size: int | None = None
) -> Run:
    """The run of a configuration on data of which only the size is known.

    Args:
      config: the resolved configuration.
      mesh: of devices that need not be here.
      memory: bytes of a device.
      images: number of training images; None: the known number for config.data.name.
      image_size: in pixels; None: the known size. config.data.image_size overrides both.

    Raises:
      UserError: if the size of the data set is unknown, or the clients do not fit it.
    """
    for field, value, allowed in (
        ("resist.source", config.resist.source, None),
        ("resist.target_share", config.resist.target_share, 1),
    ):
        if value != allowed:
            raise UserError(
                f"config.{field}: found {value}, allowed: {allowed} (others are not compiled here)"
            )
    known, known_size = data.SIZES.get(config.data.name, (None, None))
    count, size = images or known, config.data.image_size or image_size or known_size
    if count is None:
        raise UserError(
            f"--images: found None for {config.data.name}, allowed: its number of training images"
        )
    if size is None:
        raise UserError(f"--image_size: found None for {config.data.name}, allowed: its image size in pixels")
    share, batch = count // config.clients.num, config.clients.batch_size
    if count < batch:
        raise UserError(
            f"config.clients.batch_size: found {batch}, allowed: 1 to {count}, the images there are"
        )
    if share < batch:
        raise UserError(
            f"config.clients.num: found {config.clients.num}, allowed: 1 to {count // batch} ({count} images "
            f"in batches of {batch})"
        )
    experiment.check(config, mesh)

    def pictures(number: int, height: int, width: int) -> np.ndarray:
        return np.broadcast_to(np.uint8(0), (number, height, width, 3))  # takes no memory

    whole = data.keeps_whole_images(config.data.name, config.data.image_size)
    dataset = Dataset(
        x_train=pictures(count, size, size),
        y_train=np.broadcast_to(np.int32(0), (count,)),
        x_test=pictures(TEST_IMAGES, size, size),
        y_test=np.broadcast_to(np.int32(0), (TEST_IMAGES,)),
        class_names=tuple(map(str, range(CLASSES))),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        source=config.data.name,
        # Views are cropped from whole images where they are resized.
        whole=pictures(count, *canvas.shape(size)[:2]) if whole else None,
    )
    parts = [np.broadcast_to(np.int32(0), (share,))] * config.clients.num
    residence = batches.residence(config.data.resident, math.prod(experiment.views_of(dataset).shape), memory)
    return experiment.assemble(config, mesh, None, dataset, parts, residence, {})


def plans(run: Run, names: Sequence[str] = NAMES) -> Iterator[Plan]:
    """The programs of a run. Nothing is compiled yet."""
    mesh = run.mesh
    everywhere, first = meshes.everywhere(mesh), SingleDeviceSharding(meshes.first_device(mesh))
    key = _shape(jax.random.key(0), everywhere)
    resident = math.prod(run.views.shape) if run.residence.resident else 0

    def plan(
        name: str,
        function: Any,
        *arguments: Any,
        images: int = 0,
        elsewhere: int = resident,
        steps: int = 1,
    ) -> Plan:
        return Plan(
            name,
            lambda: function.lower(*arguments),
            lambda: function.trace(*arguments).jaxpr.jaxpr,
            arguments=_bytes_on_device(arguments),
            images=images + min(elsewhere, resident),
            elsewhere=elsewhere,
            steps=steps,
        )

    algorithm = run.algorithm
    cohort = None if run.whole_pool else _shape(np.zeros(run.cohort, np.int32), everywhere)
    state = states.placed(mesh, algorithm.homes, jax.eval_shape(algorithm.init, key))
    at_work = states.placed(mesh, algorithm.homes, jax.eval_shape(algorithm.enter, state, cohort))
    if "init" in names:
        yield plan("init", jax.jit(algorithm.init), key, elsewhere=0)
    if "enter" in names:
        yield plan("enter", jax.jit(algorithm.enter, donate_argnums=0), state, cohort)
    if "round" in names:
        size = programs.piece_steps(run)
        piece = programs.piece(run, size)
        one, several = programs.round_programs(run)
        yield plan(
            "round",
            several if size > 1 else one,
            at_work,
            piece,
            key,
            images=_bytes_on_device(piece),
            steps=size,
        )
    if "sync" in names:
        yield plan("sync", jax.jit(algorithm.sync, donate_argnums=0), at_work)
    if "leave" in names:
        yield plan("leave", jax.jit(algorithm.leave, donate_argnums=0), at_work)
    pictures = _shape(run.dataset.x_train[:BATCH], everywhere)
    encode = make_encode(algorithm, run.dataset.mean, run.dataset.std).batch
    if "encode" in names:
        yield plan("encode", encode, state, pictures, images=_bytes_on_device(pictures))
    if "knn" in names:
        features: Features = jax.eval_shape(encode, state, pictures)
        width = max(x.shape[-1] for x in features)
        count = len(run.dataset.x_train)
        rows = np.broadcast_to(np.float32(0), (count, width))
        block = knn.block_rows(count, TEST_IMAGES)
        neighbours, temperature = min(run.config.eval.knn_k, count), run.config.eval.knn_temperature
        classify = jax.jit(lambda *features: knn.predict(*features, CLASSES, neighbours, temperature))
        yield plan(
            "knn",
            classify,
            _shape(rows, first),
            _shape(run.dataset.y_train, first),
            _shape(np.broadcast_to(np.float32(0), (block, width)), first),
            elsewhere=resident + _bytes_on_device(state),
        )


def _shape(array: Any, place: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)


def _bytes_on_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
