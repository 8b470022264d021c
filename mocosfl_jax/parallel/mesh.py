"""The mesh of devices, and how images and stacks of clients are sharded over it.

The mesh has two axes, `data` and `model`. Stacks of clients (pool, cohort, their images, views and smashed
data, queues per client) and the concatenated batch are sharded over both axes together, with one shard per
device. Sharded over `data` alone, the devices along `model` would hold and compute the same clients. A run on
one device has a mesh of 1 x 1.

A number of clients that the number of devices does not divide is padded: with zeros at rest and where models
are run, and elsewhere by XLA, which masks the padding in its sums.
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
EVERY = (DATA, MODEL)  # both axes as one: one shard per device
CLIENTS = P(EVERY)  # shards the leading axis: clients, or rows of the concatenated batch
VIEWS = P(None, EVERY)  # shards the rows of views of the concatenated batch [views, n, ...]


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a configuration.

    A size of None takes the devices that the other size leaves. If both are None, all devices are on `data`.
    If both are given, they may leave devices unused.

    Args:
      sizes: Of both axes.
      devices: The devices to use, as listed by `jax.devices()`.

    Raises:
      UserError: If there are too few devices, or they cannot be divided evenly.
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
            "devices, when they belong to several processes"
        )
    # Axis type Auto lets XLA partition the algorithm.
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
    """The first device of the mesh. With several processes it is the same one on all of them."""
    device: jax.Device = mesh.devices.flat[0]
    return device


def check_queue(mesh: Mesh, queue_size: int) -> None:
    """Raise UserError if `model` does not divide the rows of the shared queue."""
    model = mesh.shape[MODEL]
    if queue_size % model:
        raise UserError(
            f"queue_size: found {queue_size}, allowed: multiples of {model}, the devices along model"
        )


def describe(mesh: Mesh) -> str:
    """The mesh as the end of a sentence; empty for one device."""
    return "" if mesh.size == 1 else f", mesh of data {mesh.shape[DATA]} x model {mesh.shape[MODEL]}"


def sharding(mesh: Mesh, spec: P) -> Sharding:
    """How an array of this spec lies on the mesh."""
    return SingleDeviceSharding(first_device(mesh)) if mesh.size == 1 else NamedSharding(mesh, spec)


def everywhere(mesh: Mesh) -> Sharding:
    """The sharding of an array with a copy on every device of the mesh."""
    return sharding(mesh, P())


def replicate(mesh: Mesh, array: np.ndarray) -> Array:
    """Put a copy of `array` on every device of the mesh."""
    return jax.device_put(array, everywhere(mesh))


def of_clients(mesh: Mesh, count: int) -> Sharding:
    """The sharding of a stack of `count` clients: one shard per device, if the devices divide `count`."""
    return sharding(mesh, CLIENTS if count % mesh.size == 0 else P())


def of_images(mesh: Mesh, places: int) -> Sharding:
    """The sharding of `padded` images [s, M, B, H, W, 3]: each client's images are on the client's device."""
    return sharding(mesh, P(None, *of_views(places)))


def padded(mesh: Mesh, places: int, batch: int) -> tuple[int, int]:
    """M and B of the images that a step receives: enlarged so that `of_images` gives equal shards."""
    size = mesh.size
    return (places, share(batch, size) * size) if places == 1 else (share(places, size) * size, batch)


def make_spread(mesh: Mesh, places: int, batch: int) -> Callable[[Array], Array]:
    """A function that removes the padding of images, inside a step, and shards them by client.

    It maps `padded` images [M, B, H, W, 3] to [places, batch, H, W, 3].
    """
    if mesh.size == 1:
        return lambda images: images

    def spread(images: Array) -> Array:
        images = images[:places, :batch]
        return at(mesh, images, of_views(places))

    return spread


def at(mesh: Mesh, x: Array, spec: P) -> Array:
    """`x`, constrained to this sharding inside a program."""
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def share(count: int, size: int) -> int:
    """How many of `count` rows each of `size` devices holds; the last devices may hold fewer."""
    return math.ceil(count / size)


def of_views(places: int) -> P:
    """Shards images [M, B, ...] by client, or by image if there is one client, as in centralised MoCo."""
    return CLIENTS if places > 1 else VIEWS


def pad(x: Array, size: int) -> Array:
    """`x` [n, ...] with rows of zeros appended until `size` divides their number."""
    missing = share(len(x), size) * size - len(x)
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def pad_tree(tree: Any, size: int) -> Any:
    """`pad` every leaf."""
    return jax.tree.map(lambda leaf: pad(leaf, size), tree)
