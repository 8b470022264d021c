"""The mesh: the devices of a run, how many share what, and where arrays go on them.

The mesh has two axes, `data` and `model`. Stacks of clients (pool, cohort, their images, views and smashed data,
queues per client) and the concatenated batch have one shard per device, over both axes together: along `data`
alone, the devices along `model` would hold and compute the same clients. With `model` = 1, the default, it is `data`
alone. A run on one device has a mesh of 1 x 1.

Numbers of clients that do not divide by the devices are padded: with zeros at rest and where models are run, and
elsewhere by XLA, which masks the padding wherever it sums over it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mocosfl_jax import config
from mocosfl_jax.errors import UserError
from mocosfl_jax.runtime import hosts

DATA, MODEL = "data", "model"
EVERY = (DATA, MODEL)  # both axes as one: a shard for every device
CLIENTS = P(EVERY)  # leading axis of clients, or of the rows of the concatenated batch
VIEWS = P(None, EVERY)  # views of the concatenated batch [views, n, ...]


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a configuration.

    A size of None takes what the other leaves of the devices; without any, all are on `data`. Where both are
    given, they may leave devices out.

    Args:
      sizes: of both axes.
      devices: that may be used, as `jax.devices()` lists them.

    Raises:
      UserError: if there are not as many devices, or if they cannot be divided evenly.
    """
    count = len(devices)
    if sizes.data is not None and sizes.model is not None:
        data, model = sizes.data, sizes.model
        if data * model > count:
            raise UserError(
                f"config.mesh: found data {data} and model {model}, allowed: a product of at most {count}, "
                "the number of devices"
            )
    else:
        for name, size in (("data", sizes.data), ("model", sizes.model)):
            if size is not None and count % size:
                allowed = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
                raise UserError(
                    f"config.mesh.{name}: found {size}, allowed: {allowed} (divisors of {count}, the number "
                    "of devices)"
                )
        model = sizes.model or count // (sizes.data or count)
        data = count // model
    if hosts.several() and data * model < count:
        raise UserError(
            f"config.mesh: found data {data} and model {model}, allowed: a product of {count}, the number of "
            "devices, where these belong to several processes"
        )
    # Of axis type Auto: XLA partitions the algorithm, from what is said here.
    return jax.make_mesh(
        (data, model), EVERY, axis_types=(AxisType.Auto,) * 2, devices=devices[: data * model]
    )


def one_device(device: jax.Device) -> Mesh:
    """The mesh of a single device."""
    return make_mesh(config.Mesh(data=1, model=1), [device])


def platform(mesh: Mesh) -> str:
    """The platform of the devices: "cpu", "gpu" or "tpu"."""
    return first_device(mesh).platform


def first_device(mesh: Mesh) -> jax.Device:
    """One of the devices, the same on all processes."""
    device: jax.Device = mesh.devices.flat[0]
    return device


def check_queue(mesh: Mesh, queue_size: int) -> None:
    """Raise UserError if the rows of the shared queue cannot be divided over `model`."""
    model = mesh.shape[MODEL]
    if queue_size % model:
        raise UserError(
            f"config.moco.queue_size: found {queue_size}, allowed: multiples of {model} (config.mesh.model)"
        )


def describe(mesh: Mesh) -> str:
    """The mesh in words, nothing for one device: the part of a sentence."""
    return "" if mesh.size == 1 else f", mesh of data {mesh.shape[DATA]} x model {mesh.shape[MODEL]}"


def _sharding(mesh: Mesh, spec: P) -> Sharding:
    return SingleDeviceSharding(first_device(mesh)) if mesh.size == 1 else NamedSharding(mesh, spec)


def replicate(mesh: Mesh, array: np.ndarray) -> Array:
    """`array` on every device of the mesh."""
    return jax.device_put(array, _sharding(mesh, P()))


def of_clients(mesh: Mesh, count: int) -> Sharding:
    """Where a stack of `count` clients goes: one shard per device, where they divide."""
    return _sharding(mesh, CLIENTS if count % mesh.size == 0 else P())


def of_images(mesh: Mesh, places: int) -> Sharding:
    """Where images of steps [s, M, B, H, W, 3], `padded`, go: to the devices of their clients."""
    return _sharding(mesh, P(None, *of_views(places)))


def padded(mesh: Mesh, places: int, batch: int) -> tuple[int, int]:
    """M and B of images that `of_images` divides, with places that only fill up the devices."""
    size = mesh.size
    return (places, share(batch, size) * size) if places == 1 else (share(places, size) * size, batch)


def make_spread(mesh: Mesh, places: int, batch: int) -> Callable[[Array], Array]:
    """How a step spreads its images, for `rounds`: to the devices of their clients.

    Takes them as `padded` says, and gives [places, batch, H, W, 3].
    """
    if mesh.size == 1:
        return lambda images: images

    def spread(images: Array) -> Array:
        images = images[:places, :batch]
        return at(mesh, images, of_views(places))

    return spread


def at(mesh: Mesh, x: Array, spec: P) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def share(count: int, size: int) -> int:
    """How many of `count` each of `size` devices has, the last ones fewer."""
    return math.ceil(count / size)


def of_views(places: int) -> P:
    """Of images [M, B, ...]. One client alone, as in centralised MoCo, has its images shared out instead."""
    return CLIENTS if places > 1 else VIEWS


def pad(x: Array, size: int) -> Array:
    """[n, ...] with rows of zeros behind, so that `size` divides it."""
    missing = share(len(x), size) * size - len(x)
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def pad_tree(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: pad(leaf, size), tree)
