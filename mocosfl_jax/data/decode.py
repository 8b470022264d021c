"""Decodes pictures on demand. A limited number of broken ones may be black."""

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

from mocosfl_jax.data import canvas
from mocosfl_jax.data.images import MAX_PIXELS, OnDisk, fit, require_memory
from mocosfl_jax.errors import UserError, one_line

_NAMED = 10  # at most so many broken images are named in a message
# Those that people have and whose decoders run no other program. `find.SUFFIXES` has their suffixes.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
# Other modes have more than 8 bits per channel, which a conversion would clip.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_ORIENTATION = 0x0112  # in EXIF
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Picture(NamedTuple):
    """An image that has not been decoded yet."""

    where: str  # its path, for messages
    open: Callable[[], IO[bytes]]  # opens its file
    label: int


class Decoded(NamedTuple):
    """What is decoded from pictures when it is read."""

    images: OnDisk  # [n, H, W, 3] uint8
    labels: np.ndarray  # [n] int32
    whole: OnDisk | None  # canvases of the whole pictures, if the images are resized


def open_file(path: Path) -> IO[bytes]:
    """Opens a file for reading; with `functools.partial`, the `open` of a `Picture`."""
    return path.open("rb")


def shape_of(pictures: list[Picture], image_size: int | None) -> tuple[int, int, int]:
    """The shape [H, W, 3] of all images: `image_size`, or the size of the first image that can be read.

    Raises:
      UserError: If the size is needed and none of the images can be read.
    """
    if image_size is not None:
        return image_size, image_size, 3
    first_reason = ""
    for picture in pictures:
        try:
            width, height = pixels(picture.open, None).size
            return height, width, 3
        except Exception as error:  # as in `tolerant`: decoders raise many kinds of errors
            first_reason = first_reason or _reason(error)
    raise UserError(f"{pictures[0].where}: not a readable image ({first_reason}), nor is any other")


def on_disk(
    split: str,
    pictures: list[Picture],
    shape: tuple[int, int, int],
    image_size: int | None,
    max_broken: float,
) -> Decoded:
    """The images of pictures, which stay on disk until they are read.

    Each picture is decoded by `pixels`. Broken pictures are treated as in `tolerant`. Reading raises
    UserError if a picture has another size than `shape`.

    Args:
      split: Name of the split, for messages.
      pictures: The pictures, in the order of the images.
      shape: [H, W, 3], the shape of each image.
      image_size: Height and width, or None to keep the stored size.
      max_broken: Fraction of pictures that may be broken.
    """
    height, width, _ = shape

    def decode_one(index: int) -> np.ndarray:
        image = pixels(pictures[index].open, image_size)
        if image.size != (width, height):
            found = f"{image.size[0]}x{image.size[1]}"
            raise UserError(
                f"{pictures[index].where}: {found} pixels, but others have {width}x{height}: set image_size"
            )
        return np.asarray(image)

    def paint_one(index: int) -> np.ndarray:
        assert image_size is not None
        return canvas.paint(pixels(pictures[index].open, None), image_size)

    labels = np.array([picture.label for picture in pictures], np.int32)
    names = [picture.where for picture in pictures]
    broken: dict[int, str] = {}
    images = tolerant(split, names, shape, decode_one, max_broken, broken)
    if image_size is None:
        return Decoded(images, labels, None)
    whole = tolerant(split, names, canvas.shape(image_size), paint_one, max_broken, broken)
    return Decoded(images, labels, whole)


def tolerant(
    split: str,
    names: Sequence[str],
    shape: tuple[int, int, int],
    decode_one: Callable[[int], np.ndarray],
    max_broken: float,
    broken: dict[int, str],
) -> OnDisk:
    """Images that are decoded by `decode_one`, on all cores. Those that it cannot decode are black.

    A warning gives the number and the names of the broken images. Leaving them out instead would change which
    images the clients hold; with black ones, all other images keep their places.

    Reading raises UserError once the broken images are more than the fraction `max_broken` of the split.

    Args:
      split: Name of the split, for messages.
      names: Name of each image, for messages.
      shape: [H, W, 3], the shape of each image.
      decode_one: Index -> image. A UserError is passed on; any other error means that the image is broken.
      max_broken: Fraction of images that may be broken.
      broken: Index -> reason, of the broken images found so far; those found here are added.
    """
    count = len(names)

    def fill(rows: Sequence[int] | np.ndarray) -> np.ndarray:
        images = np.zeros((len(rows), *shape), np.uint8)

        def fill_one(place: int) -> None:
            index = int(rows[place])
            try:
                images[place] = decode_one(index)
            except UserError:
                raise
            except Exception as error:  # decoders raise many kinds of errors for a broken file
                broken[index] = _reason(error)

        known = len(broken)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(fill_one, range(len(rows))):
                pass
        if len(broken) > known or len(broken) > max_broken * count:
            report()
        return images

    def report() -> None:
        named = ", ".join(f"{names[i]} ({broken[i]})" for i in sorted(broken)[:_NAMED])
        named += ", ..." if len(broken) > _NAMED else ""
        found = f"{split}: {len(broken):,} of {count:,} images are not readable"
        if len(broken) > max_broken * count:
            raise UserError(f"{found}, more than max_broken {max_broken:g} allows: {named}")
        logging.warning("%s and become black: %s", found, named)

    def load() -> np.ndarray:
        require_memory(f"{split}: {count} images", count * math.prod(shape))
        return fill(range(count))

    return OnDisk((count, *shape), fill, load, broken.keys())


def read(path: Path, image_size: int) -> np.ndarray | str:
    """The picture [image_size, image_size, 3] uint8 in a file, or the reason why it cannot be read."""
    try:
        return np.asarray(pixels(partial(open_file, path), image_size))
    except Exception as error:  # as in `tolerant`: decoders raise many kinds of errors
        return _reason(error)


def _check(image: Image.Image) -> None:
    """Raises ValueError, before decoding, if an image is too large or has more than 8 bits per channel."""
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise ValueError(f"{image.size[0]}x{image.size[1]} pixels, at most {MAX_PIXELS:,} in all are allowed")
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode}, 8 bits per channel are needed")


def pixels(open_picture: Callable[[], IO[bytes]], image_size: int | None) -> Image.Image:
    """Decodes a picture to RGB as a viewer shows it: upright, and on white where it is transparent.

    Of several frames, it is the first one. If `image_size` is set, the picture is resized by `images.fit`.

    Raises:
      Exception: Decoders raise many kinds of errors for a broken file.
    """
    with open_picture() as file, Image.open(file, formats=_FORMATS) as image:
        _check(image)
        image.load()
        upright = _upright(image)
    rgb = _on_white(upright) if upright.has_transparency_data else upright.convert("RGB")
    return rgb if image_size is None else fit(rgb, image_size)


def _upright(image: Image.Image) -> Image.Image:
    """Turns and mirrors an image as its EXIF orientation says. Pillow has done so already for TIFF."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # a broken EXIF block raises many kinds of errors; the picture itself may be whole
        turn = None
    return image if turn is None else image.transpose(turn)


def _on_white(image: Image.Image) -> Image.Image:
    """Composites an image with an alpha channel or a transparent colour on white."""
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text would repeat the name of the file
        return "not an image of a known format"
    return one_line(error)
