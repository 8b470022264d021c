"""Feeds the images of each step to the devices: gathered from a resident data set, or streamed from the host.

Both feeds give the same images in the same order to the same compiled step, so results do not depend on the
choice.
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

# Data sets up to this fraction of the device's memory are resident: state and activations need most of it.
RESIDENT_SHARE = 0.25
# The same limit on a CPU, for which JAX reports no memory size: the device's memory is the machine's.
RESIDENT_BYTES_ON_CPU = 2 * 2**30
# Limit of the images in one call of a scanned program. Several calls may be queued on the device.
PIECE_BYTES = 64 * 2**20
# Limit of the images that the host loads ahead.
_AHEAD_BYTES = 512 * 2**20
# Each thread loads one piece at a time. Where images are decoded, each also has its own pool of threads.
_THREADS = 4

# (epoch, counted from 0; steps of it) -> the images of these steps in pieces [s, M, B, H, W, 3], uint8, on
# the device.
Feed = Callable[[int, range], Iterator[Array]]
Indices = Callable[[int], np.ndarray]  # epoch -> int32 [S, M, B] into the images


class Residence(NamedTuple):
    """Where the training images are kept."""

    resident: bool  # True: all of them on the device; False: streamed from the host
    why: str  # the reason, in words


def residence(resident: bool | None, size: int, memory: int | None, copies: int = 1) -> Residence:
    """Decides where the training images are kept.

    Args:
      resident: The wanted answer, or None to decide by size.
      size: Bytes of all training images.
      memory: Bytes of the device that would hold them; None if it does not report them, as a CPU.
      copies: Devices of this process, each of which would hold all of them. Those of a CPU share its memory.

    Raises:
      UserError: If `resident` is True and the run has several processes.
    """
    if hosts.several():
        if resident:
            raise UserError(
                "resident: found True, allowed: False or None with several processes, since each "
                "loads only the images of its own clients"
            )
        return Residence(False, "each process loads those of its own clients")
    if resident is not None:
        return Residence(resident, f"config.data.resident is {resident}")
    if memory:
        most = RESIDENT_SHARE * memory
        bound = f"{RESIDENT_SHARE:.0%} of the device's memory"
    else:
        most = RESIDENT_BYTES_ON_CPU / copies
        bound = "the limit for a device that does not report its memory"
        if copies > 1:
            bound += f", of which there are {copies}"
    relation = "at most" if size <= most else "more than"
    return Residence(size <= most, f"{relation} {most / 2**30:.3g} GiB, {bound}")


def steps_per_piece(batch_size: int, steps_per_round: int) -> int:
    """The number of steps that one program scans, at least 1.

    These are the steps of a round, or fewer if their images would exceed `PIECE_BYTES`.

    Example:
      >>> steps_per_piece(batch_size=16 * 2**20, steps_per_round=60)
      4

    Args:
      batch_size: Bytes of the images of one step.
      steps_per_round: Steps from one synchronization to the next.
    """
    return max(1, min(steps_per_round, PIECE_BYTES // batch_size))


def pieces(steps: range, size: int) -> Iterator[range]:
    """Splits `steps` into pieces of `size` steps, and the rest into pieces of one step.

    So pieces have only two lengths, and only two programs are compiled.

    Example:
      >>> [list(piece) for piece in pieces(range(8), 3)]
      [[0, 1, 2], [3, 4, 5], [6], [7]]
    """
    first = steps.start
    while first < steps.stop:
        length = size if first + size <= steps.stop else 1
        yield range(first, first + length)
        first += length


def resident(images: Array, indices: Indices, piece_steps: int, place: Sharding) -> Feed:
    """A feed that gathers its images on the device.

    Args:
      images: [n, H, W, 3] uint8, all training images, on the device.
      indices: Epoch -> [S, M, B] int32, the images of each step.
      piece_steps: Steps of a piece, as in `pieces`.
      place: The sharding of the pieces [s, M, B, H, W, 3].
    """
    gather = jax.jit(lambda images, indices: images[indices], out_shardings=place)
    indices = lru_cache(1)(indices)

    def feed(epoch: int, steps: range) -> Iterator[Array]:
        for piece in pieces(steps, piece_steps):
            yield gather(images, indices(epoch)[piece.start : piece.stop])

    return feed


def _local_parts(shape: tuple[int, ...], place: Sharding) -> dict[Any, Any]:
    """The part of an array [s, M, B] on each device of this process."""
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
    """A feed from the host, which loads the next pieces while the device works.

    Loading continues across the ends of epochs, so there is no wait after an evaluation. It restarts when a
    call asks for steps that do not follow those of the last call: at the start, and after epochs that need no
    images.

    Args:
      images: [n, H, W, 3] uint8, in memory or on disk.
      indices: Epoch -> [S, M, B] int32, the images of each step.
      piece_steps: Steps of a piece, as in `pieces`.
      place: The sharding of the pieces [s, M, B, H, W, 3].
      epochs: Length of the run, including the epochs before a resumption.
      steps_per_epoch: S.
      steps_per_round: Steps from one synchronization to the next. Each round is split into pieces on its own;
        the last round of an epoch may be shorter.
    """
    indices = lru_cache(2)(indices)
    rounds = (
        range(first, min(first + steps_per_round, steps_per_epoch))
        for first in range(0, steps_per_epoch, steps_per_round)
    )
    plan = [piece for steps in rounds for piece in pieces(steps, piece_steps)]  # of every epoch

    def load(count: int) -> list[np.ndarray]:
        """The parts of a piece for the devices of this process."""
        epoch, number = divmod(count, len(plan))
        rows = indices(epoch)[plan[number].start : plan[number].stop]
        return [images[rows[part]] for part in _local_parts(rows.shape, place).values()]

    of_step = indices(0).shape[1:] + images.shape[1:]  # [M, B, H, W, 3]

    def put(parts: list[np.ndarray], steps: int) -> Array:
        shape = (steps, *of_step)
        devices = _local_parts(shape[:3], place)
        pieces = [jax.device_put(part, device) for part, device in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, place, pieces)

    size = math.prod(of_step) * piece_steps
    ahead = max(2, min(2 * _THREADS, _AHEAD_BYTES // size))
    options = grain.ReadOptions(num_threads=min(ahead, _THREADS), prefetch_buffer_size=ahead)
    starts = {steps.start: number for number, steps in enumerate(plan)}
    loading: grain.DatasetIterator | None = None
    following = -1

    def feed(epoch: int, steps: range) -> Iterator[Array]:
        nonlocal loading, following
        for piece in pieces(steps, piece_steps):
            number = starts.get(piece.start)
            if number is None or plan[number] != piece:
                raise UserError(
                    "config.data.resident: found False and a run that goes on within a round, since its data "
                    "had rounds of another length, allowed: True"
                )
            count = epoch * len(plan) + number
            if loading is None or count != following:
                if loading is not None:
                    loading.close()
                source = grain.MapDataset.range(count, epochs * len(plan)).map(load)
                loading = iter(source.to_iter_dataset(options))
            following = count + 1
            yield put(next(loading), len(piece))

    return feed
