"""The images of each step on the device: gathered there from the whole set, or streamed from the host.

Both give the same images in the same order to the same compiled step, so results do not depend on the choice.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

from mocosfl_jax.data import Images
from mocosfl_jax.errors import UserError
from mocosfl_jax.runtime import hosts

# A set up to this share of the device's memory stays there: state and activations need most of it.
RESIDENT_SHARE = 0.25
# On a CPU, where JAX does not tell a limit and the device's memory is the machine's.
RESIDENT_BYTES_ON_CPU = 2 * 2**30
# Images that one call of a scanned program gets at most; several calls wait on the device.
PIECE_BYTES = 64 * 2**20
# Loaded ahead on the host.
_AHEAD_BYTES = 512 * 2**20
_THREADS = 4  # that load a piece each; where images are decoded, each has a pool of its own

# Epoch (from 0) and steps of it -> their images, piece by piece: [s, M, B, H, W, 3] uint8 on the device.
Feed = Callable[[int, range], Iterator[Array]]
Indices = Callable[[int], np.ndarray]  # epoch -> int32 [S, M, B] into the images


class Residence(NamedTuple):
    """Where the training images are, and in words why."""

    resident: bool  # on the device, whole
    why: str


def residence(resident: bool | None, size: int, device: jax.Device) -> Residence:
    """Where a training set of `size` bytes is to be on `device`; `resident` says so unless it is None.

    Raises:
      UserError: if several processes are to have it whole.
    """
    if hosts.several():
        if resident:
            raise UserError(
                "config.data.resident: found True, allowed: False or None with several processes, of which "
                "each loads the images of its own clients"
            )
        return Residence(False, "each process loads those of its own clients")
    if resident is not None:
        return Residence(resident, f"config.data.resident is {resident}")
    stats = device.memory_stats() or {}
    if limit := stats.get("bytes_limit"):
        most = RESIDENT_SHARE * limit
        bound = f"{RESIDENT_SHARE:.0%} of the device's memory"
    else:
        most, bound = RESIDENT_BYTES_ON_CPU, "the limit of a device that does not tell its memory"
    relation = "at most" if size <= most else "more than"
    return Residence(size <= most, f"{relation} {most / 2**30:.3g} GiB, {bound}")


def steps_per_piece(batch_size: int, steps_per_round: int) -> int:
    """Steps that one program scans: a round's, or fewer where their images, `batch_size` bytes, are many."""
    return max(1, min(steps_per_round, PIECE_BYTES // batch_size))


def pieces(steps: range, size: int) -> Iterator[range]:
    """`steps` in pieces of `size`, and what is left one by one: two lengths, so two compiled programs."""
    first = steps.start
    while first < steps.stop:
        length = size if first + size <= steps.stop else 1
        yield range(first, first + length)
        first += length


def resident(images: Array, indices: Indices, piece_steps: int, place: Sharding) -> Feed:
    """A feed from the whole set [n, H, W, 3] uint8 on the device.

    `place` is where the pieces go.
    """
    gather = jax.jit(lambda images, indices: images[indices], out_shardings=place)
    indices = lru_cache(1)(indices)

    def feed(epoch: int, steps: range) -> Iterator[Array]:
        for piece in pieces(steps, piece_steps):
            yield gather(images, indices(epoch)[piece.start : piece.stop])

    return feed


def _here(shape: tuple[int, ...], place: Sharding) -> dict[Any, Any]:
    """Which part of an array [s, M, B] each device of this process gets."""
    return dict(place.addressable_devices_indices_map(shape))


def streamed(
    images: Images,
    indices: Indices,
    piece_steps: int,
    place: Sharding,
    *,
    epochs: int,
    steps_per_epoch: int,
    steps_per_round: int,
) -> Feed:
    """A feed from the host, which loads the pieces to come while the device works.

    Loading runs on over the ends of epochs, so that there is no wait after an evaluation. A call for other
    steps than those that follow the last call's (the start, or after epochs without images) begins anew.

    Args:
      images: [n, H, W, 3] uint8, in memory or on disk.
      indices: of the images of an epoch.
      piece_steps: steps of a piece, as in `pieces`.
      place: where the pieces go.
      epochs: of the run, with those that are behind it.
      steps_per_epoch: S.
      steps_per_round: rounds are cut into pieces one by one; the last of an epoch may be shorter.
    """
    indices = lru_cache(2)(indices)
    rounds = (
        range(first, min(first + steps_per_round, steps_per_epoch))
        for first in range(0, steps_per_epoch, steps_per_round)
    )
    plan = [piece for steps in rounds for piece in pieces(steps, piece_steps)]  # of each epoch

    def load(count: int) -> list[np.ndarray]:
        """What the devices of this process get of a piece."""
        epoch, number = divmod(count, len(plan))
        rows = indices(epoch)[plan[number].start : plan[number].stop]
        return [images[rows[part]] for part in _here(rows.shape, place).values()]

    def put(parts: list[np.ndarray], steps: int) -> Array:
        shape = (steps, *indices(0).shape[1:], *images.shape[1:])
        devices = _here(shape[:3], place)
        pieces = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, place, pieces)

    size = math.prod(images.shape[1:]) * indices(0)[0].size * piece_steps
    ahead = max(2, min(2 * _THREADS, _AHEAD_BYTES // size))
    options = grain.ReadOptions(num_threads=min(ahead, _THREADS), prefetch_buffer_size=ahead)
    starts = {steps.start: number for number, steps in enumerate(plan)}
    loading: grain.DatasetIterator | None = None
    following = -1

    def feed(epoch: int, steps: range) -> Iterator[Array]:
        nonlocal loading, following
        for piece in pieces(steps, piece_steps):
            count = epoch * len(plan) + starts[piece.start]
            if loading is None or count != following:
                if loading is not None:
                    loading.close()
                source = grain.MapDataset.range(count, epochs * len(plan)).map(load)
                loading = iter(source.to_iter_dataset(options))
            following = count + 1
            yield put(next(loading), len(piece))

    return feed
