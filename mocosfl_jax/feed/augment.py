"""Augmentation: draws a query and a key view of every image.

The functions here take one image and one PRNG key. `two_views` vmaps them over views, clients and batch.

"v1" are the views of MoCo (He et al., CVPR 2020). "v2" are those of MoCo v2 with Gaussian blur (Chen et al.
2020, "Improved baselines with momentum contrastive learning"). Each operation follows torchvision and PIL, on
RGB images of float32 in [0, 1] and shape [H, W, 3].

There are no branches, since under `vmap` a `cond` computes both of its sides anyway. An operation that is not
drawn gets the parameter that makes it the identity, or its result is discarded by a `where`. Crop, resize and
blur are linear along each axis, so they are products with small matrices.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mocosfl_jax.algorithm.messages import Views
from mocosfl_jax.data import canvas
from mocosfl_jax.errors import UserError

VERSIONS = ("v1", "v2")

# RandomResizedCrop
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
# ColorJitter: factors within 1 -+ these values, hue shift within -+ HUE.
JITTER_PROBABILITY = 0.8
BRIGHTNESS = 0.4
CONTRAST = 0.4
SATURATION = 0.4
HUE = 0.1
GRAYSCALE_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.1, 2.0)
NO_BLUR = 0.01  # a standard deviation so small that the blur is the identity
FLIP_PROBABILITY = 0.5
# PIL's "L" conversion, ITU-R 601-2.
LUMA = (0.299, 0.587, 0.114)


class Box(NamedTuple):
    """A part of an image, in pixels: int32, or float32 where the image is squeezed."""

    top: ArrayLike  # []
    left: ArrayLike  # []
    height: ArrayLike  # []
    width: ArrayLike  # []


def two_views(
    rng: Array,
    images: Array,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    version: str = "v2",
    min_crop_scale: float = 0.08,
) -> Views:
    """Draws a query view and a key view of every image, all of them independent.

    The views are those of MoCo (He et al., CVPR 2020) or of MoCo v2 (Chen et al. 2020).

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> images = jnp.zeros((4, 2, 32, 32, 3), jnp.uint8)  # 2 images of each of 4 clients
      >>> draw = jax.jit(functools.partial(two_views, size=32, mean=(0.5,) * 3, std=(0.25,) * 3))
      >>> views = jax.eval_shape(draw, jax.random.key(0), images)  # draw(...) draws them
      >>> views.query.shape, views.key.dtype
      ((4, 2, 32, 32, 3), dtype('float32'))

    Args:
      rng: A typed key, of `jax.random.key`, or the typed keys [2, M, B] of the single views that it would be
        split into.
      images: [M, B, H, W, 3], B images of each of M clients: uint8, or floats in [0, 1]. The values of
        floats are checked where they are in a NumPy array. In a JAX array they may not be known yet.
      size: Height and width of the views.
      mean: Mean of each of the three channels, for images in [0, 1].
      std: Standard deviation of each of the three channels, for images in [0, 1].
      version: "v1" (without blur) or "v2".
      min_crop_scale: Smallest fraction of the image's area that the crop keeps, in (0, 1].

    Returns:
      Query and key views, each [M, B, size, size, 3] float32, normalised.

    Raises:
      UserError: If the images are of another shape or dtype, or floats far above 1; if `rng` is no typed key;
        if the version is unknown, or `size` or `min_crop_scale` is out of range.
    """
    if len(jnp.shape(images)) != 5 or jnp.shape(images)[-1] != 3:
        raise UserError(f"images: found shape {jnp.shape(images)}, allowed: [M, B, H, W, 3], M clients")
    _check_images(images)

    def view(rng_view: Array, image: Array) -> Array:
        drawn = augment(rng_view, to_float(image), size=size, version=version, min_crop_scale=min_crop_scale)
        return normalise(drawn, mean, std)

    return _views_of_each(view, rng, images)


def two_views_of_canvases(
    rng: Array,
    canvases: Array,
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    version: str = "v2",
    min_crop_scale: float = 0.08,
) -> Views:
    """Like `two_views`, of whole pictures of any size, as they are on canvases (`data.canvas`).

    The crops are drawn in the pixels of the pictures.

    Args:
      rng: PRNG key.
      canvases: [M, B, 2 size + 1, 2 size, 3] uint8.
      size: Height and width of the views.
      mean: As for `two_views`.
      std: As for `two_views`.
      version: As for `two_views`.
      min_crop_scale: As for `two_views`.

    Returns:
      As `two_views`.

    Raises:
      UserError: As `two_views`.
      ValueError: If the canvases have another shape.
    """
    if canvases.shape[2:] != canvas.shape(size):
        raise ValueError(f"canvases [M, B, ...] of {canvases.shape[2:]}, {canvas.shape(size)} are needed")

    def view(rng_view: Array, painted: Array) -> Array:
        height, width = (jnp.maximum(_number(pixel), 1) for pixel in painted[-1, :2])
        image = to_float(painted[:-1])
        drawn = augment(
            rng_view, image, size=size, version=version, min_crop_scale=min_crop_scale, sides=(height, width)
        )
        return normalise(drawn, mean, std)

    return _views_of_each(view, rng, canvases)


def _number(pixel: Array) -> Array:
    """The number [] int32 in the three bytes of a pixel."""
    high, middle, low = pixel.astype(jnp.int32)
    return (high << 16) | (middle << 8) | low


def _views_of_each(view: Callable[[Array, Array], Array], rng: Array, images: Array) -> Views:
    if not (isinstance(rng, Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)):
        found = rng.dtype if hasattr(rng, "dtype") else type(rng).__name__
        raise UserError(f"rng: found {found}, allowed: a typed key, of jax.random.key")
    over_batch = jax.vmap(view)
    over_clients = jax.vmap(over_batch)
    over_views = jax.vmap(over_clients, in_axes=(0, None))
    rngs = jax.random.split(rng, (2, *images.shape[:2])) if rng.ndim == 0 else rng
    query, key = over_views(rngs, images)
    return Views(query=query, key=key)


def augment(
    rng: Array,
    image: Array,
    *,
    size: int,
    version: str,
    min_crop_scale: float,
    sides: tuple[Array, Array] | None = None,
) -> Array:
    """Draws one view: [H, W, 3] float32 in [0, 1] -> [size, size, 3] float32 in [0, 1].

    The keyword arguments are those of `two_views`, and static under `jit`. `sides` are height and width of a
    picture that may have been squeezed to fit into `image`, and whose crop is drawn in its own pixels.

    Raises:
      UserError: If the version is unknown, or `size` or `min_crop_scale` is out of range.
    """
    if size < 1:
        raise UserError(f"size: found {size}, allowed: 1 or more")
    if version not in VERSIONS:
        raise UserError(f"version: found {version!r}, allowed: {', '.join(VERSIONS)}")
    if not 0 < min_crop_scale <= 1:
        raise UserError(f"min_crop_scale: found {min_crop_scale}, allowed: more than 0, at most 1")
    rng_crop, rng_flip, rng_jitter, rng_gray, rng_blur = jax.random.split(rng, 5)

    box = sample_crop_box(rng_crop, *(sides or image.shape[:2]), min_scale=min_crop_scale)
    if sides:
        box = _squeezed(box, sides, image.shape[:2])
    view = resized_crop(image, box, size)
    # torchvision flips last in v2. All later operations treat left and right alike, so the views are the
    # same.
    view = jnp.where(_uniform(rng_flip, 1)[0] < FLIP_PROBABILITY, horizontal_flip(view), view)
    view = _random_color_jitter(rng_jitter, view)
    view = jnp.where(_uniform(rng_gray, 1)[0] < GRAYSCALE_PROBABILITY, grayscale(view), view)
    if version == "v2":
        view = _random_blur(rng_blur, view)
    return view


def normalise(images: ArrayLike, mean: Sequence[float], std: Sequence[float]) -> Array:
    """(images - mean) / std for each channel.

    Example:
      >>> normalise([[0.5, 0.5, 1.0]], mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).tolist()
      [[0.0, 0.0, 2.0]]

    Args:
      images: [..., 3], uint8, or floats in [0, 1]. The values of floats are checked where they are in a NumPy
        array or a list. In a JAX array they may not be known yet.
      mean: Mean of each of the three channels, for images in [0, 1].
      std: Standard deviation of each of the three channels, for images in [0, 1].

    Returns:
      [..., 3] float32.

    Raises:
      UserError: If the images are of another dtype, or floats far above 1.
    """
    if not isinstance(images, Array):
        images = np.asarray(images)
    _check_images(images)
    images = to_float(jnp.asarray(images))
    channels = (1,) * (images.ndim - 1) + (3,)
    shift = jnp.asarray(mean, jnp.float32).reshape(channels)
    scale = jnp.asarray(std, jnp.float32).reshape(channels)
    return (images - shift) / scale


def unnormalise(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """The inverse of `normalise`: images * std + mean for each channel, cut off at 0 and 1.

    Example:
      >>> unnormalise(jnp.array([[0.0, 0.0, 9.0]]), mean=(0.5,) * 3, std=(0.25,) * 3).tolist()
      [[0.5, 0.5, 1.0]]

    Args:
      images: [..., 3], normalised.
      mean: Mean of each of the three channels.
      std: Standard deviation of each of the three channels.

    Returns:
      [..., 3] in [0, 1].
    """
    channels = (1,) * (images.ndim - 1) + (3,)
    shift = jnp.asarray(mean, images.dtype).reshape(channels)
    scale = jnp.asarray(std, images.dtype).reshape(channels)
    return jnp.clip(images * scale + shift, 0, 1)


def to_float(images: Array) -> Array:
    """uint8 in 0..255 -> float32 in [0, 1]. Floats are assumed to be in [0, 1] already."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 255
    return images.astype(jnp.float32)


_ALLOWED = "uint8 in 0..255, or floats in [0, 1]"
# Images that were resized or filtered may exceed 1 a little; in 0..255 all but black ones exceed this.
_FAR_ABOVE_1 = 2


def _check_images(images: Array | np.ndarray) -> None:
    """Refuses floats in 0..255, and other integers than uint8, whose range nothing tells."""
    floats = jnp.issubdtype(images.dtype, jnp.floating)
    if images.dtype != np.uint8 and not floats:
        raise UserError(f"images: found {images.dtype}, allowed: {_ALLOWED}")
    if floats and isinstance(images, np.ndarray) and images.size and images.max() > _FAR_ABOVE_1:
        raise UserError(f"images: found {images.dtype} up to {images.max():g}, allowed: {_ALLOWED}")


# --- crop


def sample_crop_box(rng: Array, height: int | Array, width: int | Array, *, min_scale: float) -> Box:
    """Draws the box of torchvision's RandomResizedCrop for an image of height x width pixels.

    Its area is uniform in [min_scale, 1] times that of the image, its width / height is log-uniform in
    [3/4, 4/3], both sides are rounded to pixels, and its position is uniform. If none of ten tries fits into
    the image, the box is the largest centred one whose width / height is in that range.
    """
    drawn = _uniform(rng, 2 * CROP_TRIES + 2)
    area = _between(drawn[:CROP_TRIES], min_scale * height * width, height * width)
    log_ratio = _between(drawn[CROP_TRIES:-2], math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]))
    ratio = jnp.exp(log_ratio)
    widths = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    heights = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = jnp.argmax(fits)
    found = fits[first]

    # The largest box of an allowed ratio, for the case that no try fits.
    centre_width = jnp.minimum(width, jnp.round(height * CROP_RATIO[1]).astype(jnp.int32))
    centre_height = jnp.minimum(height, jnp.round(width / CROP_RATIO[0]).astype(jnp.int32))
    box_width = jnp.where(found, widths[first], centre_width)
    box_height = jnp.where(found, heights[first], centre_height)
    top = _below(drawn[-2], height - box_height + 1)
    left = _below(drawn[-1], width - box_width + 1)
    return Box(
        top=jnp.where(found, top, (height - centre_height) // 2),
        left=jnp.where(found, left, (width - centre_width) // 2),
        height=box_height,
        width=box_width,
    )


def _squeezed(box: Box, sides: tuple[Array, Array], most: tuple[int, ...]) -> Box:
    """The box where a picture with these sides is squeezed to at most so many rows and columns.

    It keeps at least one pixel, whose parts are fractions.
    """
    rows, columns = (jnp.minimum(side, limit) for side, limit in zip(sides, most, strict=True))
    down, right = rows / sides[0], columns / sides[1]
    height, width = jnp.maximum(box.height * down, 1), jnp.maximum(box.width * right, 1)
    return Box(
        top=jnp.minimum(box.top * down, rows - height),
        left=jnp.minimum(box.left * right, columns - width),
        height=height,
        width=width,
    )


def resized_crop(image: Array, box: Box, size: int) -> Array:
    """Crops the box from an image [H, W, 3] and resizes it to [size, size, 3], bilinear with antialiasing."""
    rows = _resize_matrix(box.top, box.height, image.shape[0], size)
    columns = _resize_matrix(box.left, box.width, image.shape[1], size)
    return _along_axes(rows, columns, image)


def _resize_matrix(start: ArrayLike, length: ArrayLike, pixels: int, size: int) -> Array:
    """[size, pixels]: row i has the weights of an axis's pixels in output pixel i.

    This is PIL's bilinear filter on the pixels [start, start + length): a triangle that reaches one output
    pixel (when enlarging, one input pixel) to either side. PIL crops first, so pixels outside the box have
    weight zero.
    """
    scale = jnp.asarray(length, jnp.float32) / size
    position = jnp.arange(pixels, dtype=jnp.float32)[None, :] - start + 0.5
    centre = (jnp.arange(size, dtype=jnp.float32)[:, None] + 0.5) * scale
    weights = jnp.maximum(1 - jnp.abs(position - centre) / jnp.maximum(scale, 1), 0)
    weights = jnp.where((position >= 0) & (position < length), weights, 0)
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def horizontal_flip(image: Array) -> Array:
    """Swaps left and right of an image [H, W, 3]."""
    return image[:, ::-1]


# --- colour


def adjust_hue(image: Array, shift: ArrayLike) -> Array:
    """Rotates the HSV hue of an image [H, W, 3] by `shift` turns of the colour circle (-0.5 to 0.5)."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    # Grays have no hue. Any divisor works, as the result is multiplied by a chroma of 0.
    divisor = jnp.where(chroma > 0, chroma, 1)
    # In sixths of a turn; red is 0, green 2, blue 4.
    hue = jnp.where(
        value == red,
        (green - blue) / divisor,
        jnp.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    hue = hue + 6 * shift

    def channel(peak: int) -> Array:
        # A channel is `value` up to one sixth of a turn from its own hue, and value - chroma beyond two
        # sixths.
        distance = jnp.abs(jnp.mod(hue - peak + 3, 6) - 3)
        return value - chroma * jnp.clip(distance - 1, 0, 1)

    return jnp.stack([channel(0), channel(2), channel(4)], axis=-1)


def grayscale(image: Array) -> Array:
    """Sets all channels of an image [H, W, 3] to its luma (ITU-R 601-2)."""
    return jnp.broadcast_to(_luma(image)[..., None], image.shape)


def _luma(image: Array) -> Array:
    red, green, blue = LUMA
    return red * image[..., 0] + green * image[..., 1] + blue * image[..., 2]


def _blend(image: Array, degenerate: Array, factor: ArrayLike) -> Array:
    return jnp.clip(factor * image + (1 - factor) * degenerate, 0, 1)


def color_jitter(
    image: Array, factors: ArrayLike, hue_shift: ArrayLike, order: ArrayLike, hue_slot: ArrayLike
) -> Array:
    """Adjusts brightness, contrast, saturation and hue of an image, in the given order.

    Args:
      image: [H, W, 3].
      factors: [3], the factors of brightness, contrast and saturation.
      hue_shift: [], in turns of the colour circle.
      order: [3] int32, a permutation of brightness (0), contrast (1) and saturation (2).
      hue_slot: [] int32 in 0..3, how many of these three are adjusted before the hue.
    """
    factors, order = jnp.asarray(factors), jnp.asarray(order)

    def blend(place: int, image: Array, active: Array) -> Array:
        # The three adjustments blend with black, the mean gray or the grayscale. Factor 1 changes nothing.
        op = order[place]
        gray = _luma(image)
        degenerate = jnp.where(op == 2, gray, jnp.where(op == 1, jnp.mean(gray), 0))
        return _blend(image, degenerate[..., None], jnp.where(active, factors[op], 1))

    # Under vmap every image pays for every stage, and hue is the most expensive, so it is computed once,
    # between two runs of the blends. The blends are in loops, because XLA recomputes unrolled blends inside
    # each other, which takes twice the time.
    image = jax.lax.fori_loop(0, 3, lambda place, image: blend(place, image, place < hue_slot), image)
    image = adjust_hue(image, hue_shift)
    return jax.lax.fori_loop(0, 3, lambda place, image: blend(place, image, place >= hue_slot), image)


def _random_color_jitter(rng: Array, image: Array) -> Array:
    drawn = _uniform(rng, 9)
    # A uniform order of all four: the 3! = 6 orders of the blends and the 4 slots for the hue (before,
    # between or after them) give each of the 4! = 24 orders exactly once.
    order = jnp.argsort(drawn[1:4])
    hue_slot = _below(drawn[4], 4)
    factors = 1 + jnp.array([BRIGHTNESS, CONTRAST, SATURATION], jnp.float32) * _between(drawn[5:8], -1, 1)
    hue_shift = _between(drawn[8], -HUE, HUE)
    jittered = color_jitter(image, factors, hue_shift, order, hue_slot)
    return jnp.where(drawn[0] < JITTER_PROBABILITY, jittered, image)


# --- blur


def gaussian_blur(image: Array, sigma: ArrayLike) -> Array:
    """Gaussian blur of an image [H, W, 3] with standard deviation `sigma`, in pixels.

    Edge pixels extend beyond the edge, as in PIL. The Gaussian is truncated at 8 pixels, four times the
    largest sigma that is drawn. (PIL itself applies three box filters in a row.)
    """
    height, width = image.shape[:2]
    rows = _blur_matrix(sigma, height)
    columns = rows if width == height else _blur_matrix(sigma, width)
    return _along_axes(rows, columns, image)


def _random_blur(rng: Array, image: Array) -> Array:
    drawn = _uniform(rng, 2)
    sigma = _between(drawn[1], *BLUR_SIGMA)
    # A Gaussian that is too narrow to reach the next pixel is the identity. With a `where` on the images
    # instead, XLA would compute everything before the blur twice.
    return gaussian_blur(image, jnp.where(drawn[0] < BLUR_PROBABILITY, sigma, NO_BLUR))


def _blur_matrix(sigma: ArrayLike, pixels: int) -> Array:
    """[pixels, pixels]: row i has the weights of an axis's pixels in output pixel i."""
    radius = math.ceil(4 * BLUR_SIGMA[1])

    def gaussian(distance: Array) -> Array:
        weight = jnp.exp(-0.5 * jnp.square(distance.astype(jnp.float32) / sigma))
        return jnp.where(distance <= radius, weight, 0)

    position = jnp.arange(pixels, dtype=jnp.int32)
    weights = gaussian(jnp.abs(position[:, None] - position[None, :]))
    # Taps beyond an edge read the edge pixel: add the part of row i's Gaussian left of pixel 0, and its
    # mirror.
    tap = jnp.arange(1, radius + 1, dtype=jnp.int32)[None, :]
    left = jnp.sum(jnp.where(tap > position[:, None], gaussian(tap), 0), axis=1)
    weights = weights.at[:, 0].add(left).at[:, -1].add(left[::-1])
    return weights / jnp.sum(weights, axis=1, keepdims=True)


def _along_axes(rows: Array, columns: Array, image: Array) -> Array:
    """rows [h, H], columns [w, W], image [H, W, 3] -> [h, w, 3]."""
    # By default, accelerators multiply in bfloat16 or TF32, which is coarser than uint8 images.
    shrunk = jnp.einsum("hH,HWc->hWc", rows, image, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("wW,hWc->hwc", columns, shrunk, precision=jax.lax.Precision.HIGHEST)


# --- draws


def _uniform(rng: Array, count: int) -> Array:
    """[count] float32 in [0, 1). Each operation draws all its numbers at once to save compile time."""
    return jax.random.uniform(rng, (count,), jnp.float32)


def _between(uniform: Array, low: float | Array, high: float | Array) -> Array:
    return low + (high - low) * uniform


def _below(uniform: Array, count: ArrayLike) -> Array:
    """An integer in 0..count - 1, as `uniform` is a multiple of 2^-23 below 1: the product is below count."""
    return jnp.floor(uniform * count).astype(jnp.int32)
