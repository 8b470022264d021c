"""Arrays of 8-bit images, which every loader of this package fills: sizes, channels, statistics."""

import os
from typing import NamedTuple

import numpy as np
from PIL import Image

from mocosfl_jax.errors import UserError

# Below Pillow's own limit, so that its warning is never reached: this loader refuses instead.
MAX_PIXELS = 1 << 26

_CHUNK_BYTES = 1 << 22


class Loaded(NamedTuple):
    """What a loader returns; `mocosfl_jax.data.load` checks it and adds the statistics."""

    x_train: np.ndarray  # [n, H, W, 3] uint8
    y_train: np.ndarray  # [n], any integer dtype
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: tuple[str, ...]
    source: str


def require_memory(what: str, size: int) -> None:
    """Raises UserError where `size` bytes exceed the memory of this machine.

    A header can claim any shape, so this runs before an array is allocated.
    """
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no sysconf on this system
        return
    if size > total:
        raise UserError(f"{what}: needs {size:,} bytes of memory, this machine has {total:,}")


def fit(image: Image.Image, size: int) -> Image.Image:
    """Bilinear resize of the shorter side to `size`, then the central [size, size] pixels.

    Raises ValueError where the longer side would exceed the pixel limit.
    """
    width, height = image.size
    short = min(width, height)
    width, height = (max(size, round(side * size / short)) for side in (width, height))
    if width * height > MAX_PIXELS:
        raise ValueError(f"{image.size[0]}x{image.size[1]} pixels are too long and thin to resize")
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def resize(images: np.ndarray, size: int | None, what: str) -> np.ndarray:
    """[n, H, W, 3] uint8 -> [n, size, size, 3] uint8 by `fit`; unchanged for None or the same size.

    Raises UserError, starting with `what`, where the result does not fit into memory.
    """
    if size is None or images.shape[1:3] == (size, size):
        return images
    require_memory(what, len(images) * size * size * 3)
    resized = np.empty((len(images), size, size, 3), np.uint8)
    for row, image in zip(resized, images, strict=True):
        try:
            row[:] = np.asarray(fit(Image.fromarray(image), size))
        except ValueError as error:
            raise UserError(f"{what}: {error}") from error
    return resized


def rgb(images: np.ndarray) -> np.ndarray:
    """[n, H, W], [n, H, W, 1] or [n, H, W, 3] -> [n, H, W, 3]; gray is repeated."""
    if images.ndim == 3:
        images = images[..., None]
    return images if images.shape[-1] == 3 else np.repeat(images, 3, axis=-1)


def channel_stats(images: np.ndarray) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel of [n, H, W, 3] uint8, on [0, 1].

    Exact, from counts of the 256 values, without a float copy. The deviation of a constant channel is
    given as 1, because images are divided by it.
    """
    counts = np.zeros((3, 256), np.int64)
    step = max(1, _CHUNK_BYTES // images[0].size)
    for start in range(0, len(images), step):
        for channel in range(3):
            values = images[start : start + step, ..., channel].reshape(-1)
            counts[channel] += np.bincount(values, minlength=256)
    levels = np.arange(256) / 255
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    deviation = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    red, green, blue = mean.tolist()
    red_std, green_std, blue_std = (value or 1.0 for value in deviation.tolist())
    return (red, green, blue), (red_std, green_std, blue_std)
