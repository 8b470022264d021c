"""Decodes PNG and JPEG images when they are wanted; a few that are broken may be black."""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from absl import logging
from PIL import Image, UnidentifiedImageError

from mocosfl_jax.data.images import MAX_PIXELS, OnDisk, fit, require_memory
from mocosfl_jax.errors import UserError, one_line

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
        except Exception as error:  # see tolerant
            first_reason = first_reason or _reason(error)
    raise UserError(f"{pictures[0].where}: not a readable image ({first_reason}), nor is any other")


def on_disk(
    split: str,
    pictures: list[Picture],
    shape: tuple[int, int, int],
    image_size: int | None,
    max_broken: float,
) -> tuple[OnDisk, np.ndarray]:
    """Images [n, H, W, 3] and labels [n] int32 of the pictures, in their order, decoded when they are read.

    Each is decoded to RGB and, with `image_size`, resized by `images.fit`. Broken ones are treated as
    `tolerant` has it; an image of another size than `shape` raises UserError.
    """
    height, width, _ = shape

    def decode_one(index: int) -> np.ndarray:
        image = _decode(pictures[index], image_size)
        if image.size != (width, height):
            found = f"{image.size[0]}x{image.size[1]}"
            raise UserError(
                f"{pictures[index].where}: {found} pixels, but others have {width}x{height}: "
                "set config.data.image_size"
            )
        return np.asarray(image)

    labels = np.array([picture.label for picture in pictures], np.int32)
    names = [picture.where for picture in pictures]
    return tolerant(split, names, shape, decode_one, max_broken), labels


def tolerant(
    split: str,
    names: Sequence[str],
    shape: tuple[int, int, int],
    decode_one: Callable[[int], np.ndarray],
    max_broken: float,
) -> OnDisk:
    """Images by `decode_one`, on all cores. One that it cannot decode is black, and counted and named.

    To leave it out would change which images the clients hold, once somebody has found it; black, it has no
    gradient to give and every other image stays where it was. Raises UserError when more than the share
    `max_broken` of the split has been found broken.

    Args:
      split: for messages.
      names: of each image, for messages.
      shape: [H, W, 3] of each image.
      decode_one: index -> image; a UserError goes through, any other error means that the image is broken.
      max_broken: allowed share of broken images.
    """
    count = len(names)
    broken: dict[int, str] = {}  # found so far, and why

    def fill(rows: Sequence[int] | np.ndarray) -> np.ndarray:
        pixels = np.zeros((len(rows), *shape), np.uint8)

        def fill_one(place: int) -> None:
            index = int(rows[place])
            try:
                pixels[place] = decode_one(index)
            except UserError:
                raise
            except Exception as error:  # decoders raise many kinds for a broken file
                broken[index] = _reason(error)

        known = len(broken)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(fill_one, range(len(rows))):
                pass
        if len(broken) > known:
            report()
        return pixels

    def report() -> None:
        named = ", ".join(f"{names[i]} ({broken[i]})" for i in sorted(broken)[:_NAMED])
        named += ", ..." if len(broken) > _NAMED else ""
        found = f"{split}: {len(broken):,} of {count:,} images are not readable"
        if len(broken) > max_broken * count:
            raise UserError(f"{found}, more than config.data.max_broken {max_broken:g} allows: {named}")
        logging.warning("%s and are black: %s", found, named)

    def load() -> np.ndarray:
        require_memory(f"{split}: {count} images", count * math.prod(shape))
        return fill(range(count))

    return OnDisk((count, *shape), fill, load)


def read(path: Path, image_size: int) -> np.ndarray | str:
    """The image as [image_size, image_size, 3] uint8, or why it cannot be read."""
    picture = Picture(str(path), partial(open_file, path), 0)
    try:
        return np.asarray(_decode(picture, image_size))
    except Exception as error:  # see tolerant
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
    return one_line(error)
