"""Decodes PNG and JPEG images into one array; a few that are broken may be left out."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, UnidentifiedImageError

from mocosfl_jax.data.images import MAX_PIXELS, fit, require_memory
from mocosfl_jax.errors import UserError

# Broken images beyond this share of a split stop the run.
MAX_BROKEN = 0.01

_NAMED = 10  # broken images that a message names
_FORMATS = ("PNG", "JPEG")
# The others hold more than 8 bits, which a conversion would clip.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


class Picture(NamedTuple):
    """An image that is not decoded yet."""

    where: str  # its path, for messages
    open: Callable[[], IO[bytes]]
    label: int


def open_file(path: Path) -> IO[bytes]:
    return path.open("rb")


def shape_of(pictures: list[Picture], image_size: int | None) -> tuple[int, int, int]:
    """[H, W, 3] of every image: `image_size`, or that of the first which can be read."""
    if image_size is not None:
        return image_size, image_size, 3
    first_reason = ""
    for picture in pictures:
        try:
            with picture.open() as file, Image.open(file, formats=_FORMATS) as image:
                _check(image)
                return image.size[1], image.size[0], 3
        except Exception as error:  # see decode
            first_reason = first_reason or _reason(error)
    raise UserError(f"{pictures[0].where}: not a readable image ({first_reason}), nor is any other")


def decode(
    split: str, pictures: list[Picture], shape: tuple[int, int, int], image_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, H, W, 3] uint8 and labels [n] int32 of the pictures, in their order.

    Each is decoded to RGB straight into its place and, with `image_size`, resized by `images.fit`. Those
    that do not decode are left out with a warning. Raises UserError, with `split` in it, where they are more
    than `MAX_BROKEN`, and for an image of another size than `shape`.
    """
    count = len(pictures)
    height, width, _ = shape
    require_memory(f"{split}: {count} images", count * height * width * 3)
    pixels = np.empty((count, *shape), np.uint8)

    def decode_one(index: int) -> str | None:
        try:
            image = _decode(pictures[index], image_size)
        except Exception as error:  # decoders raise many kinds for a broken file
            return _reason(error)
        if image.size != (width, height):
            found = f"{image.size[0]}x{image.size[1]}"
            raise UserError(
                f"{pictures[index].where}: {found} pixels, but others have {width}x{height}: "
                "set config.data.image_size"
            )
        pixels[index] = np.asarray(image)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(pool.map(decode_one, range(count)))
    labels = np.array([picture.label for picture in pictures], np.int32)
    broken = [f"{pictures[i].where} ({reason})" for i, reason in enumerate(reasons) if reason is not None]
    if not broken:
        return pixels, labels
    found = f"{split}: {len(broken)} of {count} images are not readable"
    named = ", ".join(broken[:_NAMED]) + (", ..." if len(broken) > _NAMED else "")
    if len(broken) > MAX_BROKEN * count:
        raise UserError(f"{found}, at most {MAX_BROKEN:.0%} may be: {named}")
    logging.warning("%s and are left out: %s", found, named)
    good = [index for index, reason in enumerate(reasons) if reason is None]
    for place, index in enumerate(good):  # in place: indexing would copy the whole array
        if place != index:
            pixels[place] = pixels[index]
    return pixels[: len(good)], labels[good]


def read(path: Path, image_size: int) -> np.ndarray | str:
    """The image as [image_size, image_size, 3] uint8, or why it cannot be read."""
    picture = Picture(str(path), partial(open_file, path), 0)
    try:
        return np.asarray(_decode(picture, image_size))
    except Exception as error:  # see decode
        return _reason(error)


def _check(image: Image.Image) -> None:
    """Raises ValueError for an image, not decoded yet, that is too large or has more than 8 bits."""
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise ValueError(f"{image.size[0]}x{image.size[1]} pixels, at most {MAX_PIXELS:,} in all are allowed")
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode}, 8 bits a channel are needed")


def _decode(picture: Picture, image_size: int | None) -> Image.Image:
    with picture.open() as file, Image.open(file, formats=_FORMATS) as image:
        _check(image)
        # Pillow warns where a palette's transparency is dropped without the step through RGBA.
        through = image.convert("RGBA") if image.mode in ("P", "PA") else image
        rgb = through.convert("RGB")
    return rgb if image_size is None else fit(rgb, image_size)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text names the file once more
        return "not a PNG or JPEG image"
    return " ".join(f"{type(error).__name__}: {error}".split())
