"""Predictors that need no attack. An attack has learned something only where it beats them."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from mocosfl_jax.errors import UserError


def constant_colour(images: ArrayLike, colour: Sequence[float]) -> Array:
    """One colour everywhere, which needs no smashed data.

    Args:
      images: [..., H, W, 3]; only their shape matters.
      colour: [3] in [0, 1], such as the mean of a data set.

    Returns:
      [..., H, W, 3].

    Example:
      >>> constant_colour(jnp.zeros((1, 2, 2, 3)), (0.5, 0.25, 0.0))[0, 1, 1].tolist()
      [0.5, 0.25, 0.0]
    """
    images = jnp.asarray(images)
    shape = (1,) * (images.ndim - 1) + (3,)
    return jnp.broadcast_to(jnp.asarray(colour, images.dtype).reshape(shape), images.shape)


def block_means(images: ArrayLike, block: int) -> Array:
    """Each block of block x block pixels in its mean colour: what a picture of few pixels would reveal.

    With `block` as large as the images, these are the images' own mean colours.

    Args:
      images: [..., H, W, 3] in [0, 1].
      block: pixels; it must divide H and W.

    Returns:
      [..., H, W, 3].

    Raises:
      UserError: if the blocks do not fit.

    Example:
      >>> image = jnp.array([[0.0, 1.0], [0.0, 0.0]])[None, :, :, None].repeat(3, axis=-1)
      >>> block_means(image, 2)[0, :, :, 0].tolist()
      [[0.25, 0.25], [0.25, 0.25]]
    """
    images = jnp.asarray(images)
    *_, height, width, channels = images.shape
    if block < 1 or height % block or width % block:
        raise UserError(f"block: found {block}, allowed: a divisor of {height} and {width}")
    blocks = images.reshape(*images.shape[:-3], height // block, block, width // block, block, channels)
    means = jnp.mean(blocks, axis=(-4, -2), keepdims=True)
    return jnp.broadcast_to(means, blocks.shape).reshape(images.shape)
