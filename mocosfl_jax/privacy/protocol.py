"""What an attacker and its victims are given: by the clean protocol, and by the official code's.

The official protocol (`official`) has these slips, which are repeated here so that published numbers can be
compared: the attacker's images may be the victims' own, all targets and truths went through JPEG, and the
victims' images are normalised by another standard deviation than the model's, which takes contrast from them.
"""

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from PIL import Image

from mocosfl_jax.feed import augment

OFFICIAL_SHARE = 0.01  # of the training images, which the official attacker has
# The standard deviation by which the official code's file of 128 CIFAR-10 images was normalised.
OFFICIAL_VICTIMS_STD = (0.247, 0.243, 0.261)
BATCH = 250  # images at a time

Client = Callable[[Array], Array]  # normalised images [n, H, W, 3] -> smashed data [n, h, w, c]


class Given(NamedTuple):
    """Images as the client sees them, and what a reconstruction of them is compared with."""

    inputs: np.ndarray  # [n, H, W, 3] float32, normalised
    truth: np.ndarray  # [n, H, W, 3] uint8


def victim_rows(labels: np.ndarray, count: int) -> np.ndarray:
    """Which test images are attacked: the first ones, or drawn ones of a set that is in order of class.

    Args:
      labels: [n], of all test images.
      count: how many.

    Returns:
      [min(count, n)], their rows, the same on each call.

    Example:
      >>> victim_rows(np.array([1, 0, 1, 0]), 2).tolist()
      [0, 1]
      >>> victim_rows(np.array([0, 0, 1, 1]), 2).tolist()
      [2, 0]
    """
    count = min(count, len(labels))
    in_order = bool(np.all(labels[:-1] <= labels[1:]) and labels[0] < labels[-1])
    return np.random.default_rng(0).permutation(len(labels))[:count] if in_order else np.arange(count)


def clean(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Given:
    """True pixels, normalised as the model was trained.

    Args:
      images: [n, H, W, 3] uint8.
      mean: of each channel, for pixels in [0, 1].
      std: of each channel.
    """
    return Given(np.asarray(augment.normalise(images, mean, std)), images)


def official_attacker(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Given:
    """The official attacker's images: the right inputs, and targets that went through JPEG."""
    return clean(images, mean, std)._replace(truth=jpeg(images / np.float32(255)))


def official_victims(
    images: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    normalised_by: Sequence[float] = OFFICIAL_VICTIMS_STD,
) -> Given:
    """The official code's victims: normalised by `normalised_by` and taken as normalised by `std`.

    Example:
      >>> white = np.full((1, 8, 8, 3), 255, np.uint8)
      >>> given = official_victims(white, mean=(0.5,) * 3, std=(0.1,) * 3, normalised_by=(0.2,) * 3)
      >>> given.inputs[0, 0, 0].tolist(), given.truth[0, 0, 0].tolist()  # 191 / 255 is 0.5 + 0.25
      ([2.5, 2.5, 2.5], [191, 191, 191])
    """
    inputs = np.asarray(augment.normalise(images, mean, normalised_by))
    return Given(inputs, jpeg(inputs * np.array(std, np.float32) + np.array(mean, np.float32)))


def jpeg(images: np.ndarray) -> np.ndarray:
    """Images after being written as JPEG, with Pillow's default quality, and read again.

    Args:
      images: [n, H, W, 3] floats, which are clipped to [0, 1].

    Returns:
      [n, H, W, 3] uint8.
    """
    read = np.empty(images.shape, np.uint8)
    for row, image in zip(read, np.round(np.clip(images, 0, 1) * 255).astype(np.uint8), strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG")
        row[:] = np.asarray(Image.open(file))
    return read


def smash(client: Client, inputs: np.ndarray) -> np.ndarray:
    """Run a client-side model on images, a batch at a time.

    Args:
      client: the model.
      inputs: [n, H, W, 3] float32, normalised.

    Returns:
      [n, h, w, c] float32.
    """
    run = jax.jit(client)
    parts = []
    for start in range(0, len(inputs), BATCH):
        batch = inputs[start : start + BATCH]
        padding = np.zeros((BATCH - len(batch), *batch.shape[1:]), batch.dtype)
        parts.append(np.asarray(run(np.concatenate([batch, padding])), np.float32)[: len(batch)])
    return np.concatenate(parts)
