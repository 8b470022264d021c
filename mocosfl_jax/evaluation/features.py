"""Features of whole sets of images, computed once, in batches of one shape."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mocosfl_jax.algorithm.interface import Algorithm, TrainState
from mocosfl_jax.data import Images
from mocosfl_jax.feed import augment
from mocosfl_jax.models import Features

Rows = np.ndarray | Array  # [n, D] features, or [n] labels
Encode = Callable[[TrainState, np.ndarray], Features]  # state, images [n, H, W, 3] uint8 -> Features


def make_encode(algorithm: Algorithm, mean: Sequence[float], std: Sequence[float]) -> Encode:
    """Return the compiled encoder of images without augmentation.

    Args:
      algorithm: its `encode` is compiled.
      mean: per channel, for pixels on [0, 1].
      std: per channel.

    Returns:
      A function (state, images [n, H, W, 3] uint8) -> Features.
    """
    return jax.jit(lambda state, images: algorithm.encode(state, augment.normalise(images, mean, std)))


def extract(encode: Callable[[np.ndarray], Features], images: Images, batch_size: int = 250) -> Features:
    """Compute the features of all `images`, in batches of one shape.

    The next batch is read while the device encodes the current one.

    Args:
      encode: images [batch_size, H, W, 3] uint8 -> Features; jitted by the caller.
      images: [n, H, W, 3] uint8, in memory or on disk; n must be at least 1.
      batch_size: images at a time. The last batch is padded, and the features of the padding are dropped.

    Returns:
      Features of all n images.
    """
    batches: list[list[np.ndarray]] = []
    working: Features | None = None
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        if working is not None:
            batches.append([np.asarray(x) for x in working])
        padding = np.zeros((batch_size - len(batch), *images.shape[1:]), np.uint8)
        working = encode(np.concatenate([batch, padding]))
    assert working is not None
    batches.append([np.asarray(x)[: len(batch)] for x in working])
    backbone, projection = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Features(jnp.asarray(backbone), jnp.asarray(projection))
