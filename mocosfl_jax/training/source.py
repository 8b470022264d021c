"""A second data set, the source, whose images are half of each step's (TAResSFL, step A).

The run's own data set is the target, on which the network is evaluated and will be used. Of its training
images only a share may be used. A step's batch has images of the target first, and images of the source after
them.
"""

import math
from typing import NamedTuple

import numpy as np
from jax import Array

from mocosfl_jax import data
from mocosfl_jax.algorithm.messages import Views
from mocosfl_jax.config import Resolved
from mocosfl_jax.data.fingerprint import Fingerprint, fingerprint
from mocosfl_jax.data.images import in_memory
from mocosfl_jax.errors import UserError, renamed
from mocosfl_jax.feed import augment, partition

# What the user gave, by the argument of `data.load`.
_FIELDS = {
    "name": "config.resist.source",
    "directory": "config.resist.source_dir",
    "max_broken": "config.data.max_broken",
}


class Source(NamedTuple):
    """The images of target and source, and how a step takes them."""

    images: np.ndarray  # [n, H, W, 3] uint8, those of the target first
    targets: int  # number of the target's images, which may be 0
    mean: data.Channels  # by which the source's views are normalised
    std: data.Channels
    description: str

    def parts(self, batch_size: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Indices of the images of each set, and of how many of them a step takes."""
        rows = np.arange(len(self.images), dtype=np.int32)
        if not self.targets:
            return [rows], np.array([batch_size])
        return [rows[: self.targets], rows[self.targets :]], np.full(2, batch_size // 2)

    def steps_per_epoch(self, batch_size: int) -> int:
        """The number of steps, in which the larger set is seen once."""
        parts, sizes = self.parts(batch_size)
        return max(math.ceil(len(part) / size) for part, size in zip(parts, sizes, strict=True))

    def indices(self, batch_size: int, *, steps: int, seed: int, epoch: int) -> np.ndarray:
        """The images of an epoch: [S, 1, B] int32 indices into `images`."""
        parts, sizes = self.parts(batch_size)
        dealt = partition.epoch_indices(
            parts, np.arange(len(parts)), batch_sizes=sizes, steps=steps, seed=seed, epoch=epoch
        )
        return dealt.reshape(steps, 1, batch_size)

    def renormalise(self, views: Views, mean: data.Channels, std: data.Channels) -> Views:
        """Views [1, B, H, W, 3] that are all normalised by `mean` and `std`, with the source's by its own."""
        first = views.query.shape[1] // 2 if self.targets else 0

        def change(x: Array) -> Array:
            images = augment.unnormalise(x[:, first:], mean, std)
            return x.at[:, first:].set(augment.normalise(images, self.mean, self.std))

        return Views(*(change(x) for x in views))


def share_of(part: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A random share of the indices in `part`, sorted.

    Example:
      >>> len(share_of(np.arange(1000), 0.01, seed=0))
      10
    """
    if share == 1:
        return part
    return np.sort(np.random.default_rng((seed, len(part))).choice(part, round(share * len(part)), False))


def load_source(config: Resolved, dataset: data.Dataset, part: np.ndarray) -> tuple[Source, Fingerprint]:
    """Load the data set `config.resist.source`.

    Args:
      config: the resolved configuration.
      dataset: the target.
      part: indices of the target's training images that are used.

    Returns:
      The images, and what identifies those of the source.

    Raises:
      UserError: if the images have another size, or there are too few.
    """
    settings = config.resist
    name = settings.source or ""
    with renamed(_FIELDS):
        loaded = data.load(name, settings.source_dir, None, config.data.max_broken)
    size, other = dataset.x_train.shape[1:3], loaded.x_train.shape[1:3]
    if dataset.whole is not None:
        raise UserError(
            f"config.data.image_size: found {config.data.image_size}, another size than that of the images, "
            "allowed: None with a config.resist.source"
        )
    if other != size:
        raise UserError(
            f"config.resist.source: found {name} with images of {other[0]}x{other[1]} pixels, allowed: "
            f"{size[0]}x{size[1]}, as in config.data"
        )
    half = config.clients.batch_size // (2 if len(part) else 1)
    for field, what, count in (
        ("target_share", "the target", len(part) or half),
        ("source", name, len(loaded.x_train)),
    ):
        if count < half:
            raise UserError(
                f"config.resist.{field}: found {count} images of {what}, allowed: {half} or more, for a step"
            )
    faithful = settings.preset == "faithful"
    identity = {f"source_{name}": value for name, value in fingerprint(loaded).items()}
    images = np.concatenate([dataset.x_train[part], in_memory(loaded.x_train)])
    source = Source(
        images,
        len(part),
        loaded.mean if faithful else dataset.mean,
        loaded.std if faithful else dataset.std,
        f"{loaded.source}: {len(loaded.x_train):,} images, {half:,} of them in each step",
    )
    return source, identity
