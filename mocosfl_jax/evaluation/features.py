"""Features of whole sets of images, computed once, in batches of one shape."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from mocosfl_jax.algorithm.interface import Algorithm, TrainState
from mocosfl_jax.data import Images
from mocosfl_jax.feed import augment
from mocosfl_jax.models import Features

BATCH = 250  # images at a time

Rows = np.ndarray | Array  # [n, D] features, or [n] labels
Head = Callable[[TrainState, np.ndarray], Array]  # state, pooled features [n, D] -> projections [n, key_dim]


class Extracted(NamedTuple):
    """Features of a whole set of images, in the memory of the host."""

    backbone: np.ndarray  # [n, D], after global average pooling
    projection: np.ndarray  # [n, key_dim], output of the projection head, not normalised


class Encode(NamedTuple):
    """The compiled encoder of images without augmentation."""

    batch: Callable[[TrainState, np.ndarray], Features]  # state, images [n, H, W, 3] uint8 -> Features
    # For a head that mixes the rows of its batch, as batch norm does. None: rows are independent.
    head: Head | None


def make_encode(
    algorithm: Algorithm, mean: Sequence[float], std: Sequence[float], head: Head | None = None
) -> Encode:
    """Compile the encoder of images without augmentation.

    Args:
      algorithm: its `encode` is compiled.
      mean: per channel, for pixels on [0, 1].
      std: per channel.
      head: from `training.build.whole_head`, for a network whose head mixes the rows of its batch.

    Returns:
      The encoder, for `extract`.
    """
    batch = jax.jit(lambda state, images: algorithm.encode(state, augment.normalise(images, mean, std)))
    return Encode(batch, head)


def extract(encode: Encode, state: TrainState, images: Images, batch_size: int = BATCH) -> Extracted:
    """Compute the features of all `images`, as `extract_batches` does.

    Args:
      encode: the compiled encoder.
      state: the training state.
      images: [n, H, W, 3] uint8, in memory or on disk; n must be at least 1.
      batch_size: images at a time.

    Returns:
      Features of all n images.
    """
    starts = range(0, len(images), batch_size)
    return extract_batches(
        encode, state, (images[start : start + batch_size] for start in starts), batch_size
    )


def extract_batches(
    encode: Encode, state: TrainState, batches: Iterable[np.ndarray], batch_size: int = BATCH
) -> Extracted:
    """Compute the features of batches of images.

    The next batch is read while the device encodes the current one. The head of a network whose head mixes
    rows runs once, on all images, so features do not depend on how the images are divided into batches.

    Args:
      encode: the compiled encoder.
      state: the training state.
      batches: of n_i images [n_i, H, W, 3] uint8 each, 1 <= n_i <= batch_size; at least one.
      batch_size: smaller batches are padded to it, and the features of the padding are dropped.

    Returns:
      Features of all images, in their order.

    Raises:
      UserError: if there is one image alone and the head cannot encode it.
    """
    done: list[list[np.ndarray]] = []
    working: tuple[int, Features] | None = None

    def finish(count: int, features: Features) -> None:
        done.append([np.asarray(x)[:count] for x in features])

    for batch in batches:
        if working is not None:
            finish(*working)
        padding = np.zeros((batch_size - len(batch), *batch.shape[1:]), np.uint8)
        working = len(batch), encode.batch(state, np.concatenate([batch, padding]))
    assert working is not None
    finish(*working)
    backbone, projection = (np.concatenate(parts) for parts in zip(*done, strict=True))
    if encode.head is not None:
        projection = np.asarray(encode.head(state, backbone))
    return Extracted(backbone, projection)
