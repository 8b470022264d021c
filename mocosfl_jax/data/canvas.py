"""Whole pictures of any size in arrays of one shape, from which views are cropped.

A canvas for views of S pixels is [2 S + 1, 2 S, 3] uint8. The picture is at its top left. A side of more than
2 S pixels is squeezed to 2 S, which the crop undoes; a shorter one keeps its pixels. The last row holds the
picture's height and width before that, each in the three bytes of a pixel. A canvas of zeros has no picture.
"""

import numpy as np
from PIL import Image

from mocosfl_jax.data.images import Images, OnDisk, fitted, require_memory
from mocosfl_jax.errors import UserError

_FACTOR = 2  # pixels of a canvas for each pixel of a view
_LONGEST = (1 << 24) - 1  # pixels of a side, in three bytes


def shape(size: int) -> tuple[int, int, int]:
    """The shape of a canvas for views of `size` pixels."""
    return _FACTOR * size + 1, _FACTOR * size, 3


def paint(image: Image.Image, size: int) -> np.ndarray:
    """The canvas of an RGB image.

    Raises:
      ValueError: If the image is too long and thin, as in `images.fit`.
    """
    width, height = image.size
    fitted(image.size, size)
    if max(width, height) > _LONGEST:
        raise ValueError(f"{width}x{height} pixels, at most {_LONGEST:,} on a side are allowed")
    canvas = np.zeros(shape(size), np.uint8)
    rows, columns = (min(side, _FACTOR * size) for side in (height, width))
    if (columns, rows) != image.size:
        image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    canvas[:rows, :columns] = np.asarray(image)
    canvas[-1, :2] = [list(side.to_bytes(3, "big")) for side in (height, width)]
    return canvas


def canvases(images: Images, size: int, what: str) -> OnDisk:
    """The canvases of images [n, H, W, 3] uint8, painted when they are read.

    Args:
      images: The images.
      size: Height and width of the views.
      what: What is painted, for messages.
    """

    def painted(images: np.ndarray) -> np.ndarray:
        result = np.empty((len(images), *shape(size)), np.uint8)
        for place, image in enumerate(images):
            try:
                result[place] = paint(Image.fromarray(image), size)
            except ValueError as error:
                raise UserError(f"{what}: {error}") from error
        return result

    def load() -> np.ndarray:
        require_memory(what, len(images) * int(np.prod(shape(size))))
        return painted(images[:])

    return OnDisk((len(images), *shape(size)), lambda rows: painted(images[rows]), load)
