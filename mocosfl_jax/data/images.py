"""8-bit images in memory or on disk, as all loaders return them: sizes, channels, statistics."""

import dataclasses
import math
import os
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mocosfl_jax.data.find import Unused
from mocosfl_jax.errors import UserError

# Pixels in an image. This is below the limit at which Pillow warns, so larger images are refused instead.
MAX_PIXELS = 1 << 26

_CHUNK_BYTES = 1 << 22
# Statistics of larger sets are computed from evenly spaced images of this total size.
_STATS_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """Images [n, H, W, 3] uint8 that are read when they are indexed by a slice or an array of indices."""

    shape: tuple[int, ...]  # (n, H, W, 3)
    # Indices [k], ascending and without repetition -> images [k, H, W, 3]. Several threads may call it at
    # once.
    read: Callable[[np.ndarray], np.ndarray]
    load: Callable[[], np.ndarray]  # reads all images; raises UserError if they do not fit into memory
    broken: Set[int] = frozenset()  # indices of those found so far that cannot be read, and are black

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The images of a slice, or of indices of any shape. Repeated images are read once."""
        wanted = np.arange(len(self))[rows]
        unique, places = np.unique(wanted, return_inverse=True)
        images = self.read(unique)
        return images if np.array_equal(unique, wanted) else images[places.reshape(wanted.shape)]


Images = np.ndarray | OnDisk


class Loaded(NamedTuple):
    """What a loader returns. `mocosfl_jax.data.load` checks it and adds the statistics."""

    x_train: Images  # [n, H, W, 3] uint8
    y_train: np.ndarray  # [n], any integer dtype
    x_test: Images  # [n, H, W, 3] uint8
    y_test: np.ndarray  # [n], any integer dtype
    class_names: tuple[str, ...]  # one name per class
    source: str  # one line that says where the images came from
    unused: tuple[Unused, ...] = ()  # files and folders there that are not used
    whole: Images | None = None  # canvases of the whole training images, if x_train was resized


def in_memory(images: Images) -> np.ndarray:
    """The images as an array [n, H, W, 3] uint8.

    Raises:
      UserError: If they do not fit into memory or are damaged.
    """
    return images if isinstance(images, np.ndarray) else images.load()


def require_memory(what: str, size: int) -> None:
    """Checks that `size` bytes fit into the memory of this machine.

    A file's header can claim any shape, so call this before allocating an array.

    Args:
      what: What needs the memory, for the message.
      size: Bytes.

    Raises:
      UserError: If the machine has less memory.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no sysconf on this system
        return
    if size > total:
        raise UserError(f"{what}: needs {size:,} bytes of memory, this machine has {total:,}")


def fitted(image_size: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height of an image whose shorter side is resized to `size` pixels.

    Raises:
      ValueError: If that has more than `MAX_PIXELS` pixels.
    """
    short = min(image_size)
    width, height = (max(size, round(side * size / short)) for side in image_size)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image_size[0]}x{image_size[1]} pixels are too long and thin to resize")
    return width, height


def fit(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side of an image to `size` pixels (bilinear) and crops the central square.

    Raises:
      ValueError: If the resized image would have more than `MAX_PIXELS` pixels.
    """
    width, height = fitted(image.size, size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize(images: Images, size: int | None, what: str) -> Images:
    """Resizes images [n, H, W, 3] uint8 to [n, size, size, 3] uint8 with `fit`.

    Images on disk stay there and are resized when they are read. If `size` is None or is their size already,
    the images are returned unchanged.

    Args:
      images: The images.
      size: Height and width in pixels, or None.
      what: What is resized, for messages.

    Raises:
      UserError: If the result does not fit into memory, or an image is too long and thin.
    """
    if size is None or images.shape[1:3] == (size, size):
        return images
    if isinstance(images, np.ndarray):
        return _resize(images, size, what)
    return OnDisk(
        (len(images), size, size, 3),
        lambda rows: _resize(images.read(rows), size, what),
        lambda: _resize(images.load(), size, what),
        images.broken,
    )


def _resize(images: np.ndarray, size: int, what: str) -> np.ndarray:
    require_memory(what, len(images) * size * size * 3)
    resized = np.empty((len(images), size, size, 3), np.uint8)
    for row, image in zip(resized, images, strict=True):
        try:
            row[:] = np.asarray(fit(Image.fromarray(image), size))
        except ValueError as error:
            raise UserError(f"{what}: {error}") from error
    return resized


def rgb(images: np.ndarray) -> np.ndarray:
    """[n, H, W], [n, H, W, 1] or [n, H, W, 3] -> [n, H, W, 3]. Gray images get three equal channels."""
    if images.ndim == 3:
        images = images[..., None]
    return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


def channel_stats(images: Images) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, for images in [0, 1].

    They are exact for up to 256 MiB of images. For larger sets they are those of 256 MiB of evenly spaced
    images, since reading all of them may take hours. They are computed from counts of the 256 values, without
    a float copy. Broken images, which are black, do not count. The standard deviation of a constant channel
    is given as 1, because images are divided by it.

    Args:
      images: [n, H, W, 3] uint8.

    Returns:
      The means and the standard deviations of the three channels.

    Raises:
      UserError: If none of the images can be read.
    """
    counts = np.zeros((3, 256), np.int64)
    size = math.prod(images.shape[1:])
    every = max(1, math.ceil(len(images) * size / _STATS_BYTES))
    step = every * max(1, _CHUNK_BYTES // size)
    for start in range(0, len(images), step):
        rows = np.arange(start, min(start + step, len(images)), every)
        chunk = images[rows]
        if isinstance(images, OnDisk):
            chunk = chunk[[row not in images.broken for row in rows.tolist()]]
        for channel in range(3):
            counts[channel] += np.bincount(chunk[..., channel].reshape(-1), minlength=256)
    if not counts.any():
        raise UserError("directory: none of the training images can be read, at least one is needed")
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    deviation = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    red, green, blue = mean.tolist()
    red_std, green_std, blue_std = (value or 1.0 for value in deviation.tolist())
    return (red, green, blue), (red_std, green_std, blue_std)
