"""Smashed data with Gaussian noise: the simple way for clients to give away less of their images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mocosfl_jax.errors import UserError


class Noise(NamedTuple):
    """What clients do to smashed data before they leave: scale them down to a bound, then add noise.

    Noise without a bound hides nothing: clients could learn larger outputs.
    """

    rng: Array  # key of all draws
    std: float  # standard deviation of the noise in each value, in terms of `clip`
    clip: float = 1.0  # largest root mean square of one image's smashed data


def check(noise: Noise) -> None:
    """Raise UserError for a negative standard deviation, or a bound that is not more than 0."""
    if not 0 <= noise.std < float("inf"):
        raise UserError(f"noise.std: found {noise.std}, allowed: 0 or more")
    if not 0 < noise.clip < float("inf"):
        raise UserError(f"noise.clip: found {noise.clip}, allowed: more than 0")


def disturb(smashed: Array, noise: Noise, *numbers: int | Array) -> Array:
    """Clip smashed data and add noise.

    Example:
      >>> smashed = jnp.full((1, 2, 2, 3), 10.0)
      >>> disturb(smashed, Noise(jax.random.key(0), std=0.0))[0, 0, 0].tolist()
      [1.0, 1.0, 1.0]

    Args:
      smashed: [..., h, w, c].
      noise: how much. Its key is folded with `numbers`.
      numbers: integers that tell this draw from others, such as the training step.

    Returns:
      [..., h, w, c], of the same dtype.
    """
    rng = noise.rng
    for number in numbers:
        rng = jax.random.fold_in(rng, number)
    exact = _exact(smashed)  # in bfloat16, draws would have 128 values
    drawn = jax.random.normal(rng, exact.shape, exact.dtype)
    return (clipped(exact, noise.clip) + noise.std * noise.clip * drawn).astype(smashed.dtype)


def clipped(smashed: Array, clip: float) -> Array:
    """Scale the smashed data [..., h, w, c] of each image down to a root mean square of `clip` at most."""
    exact = _exact(smashed)
    mean_square = jnp.mean(jnp.square(exact), axis=(-3, -2, -1), keepdims=True)
    # The maximum keeps the gradient of an image within the bound, and that of zeros, exact.
    return (exact * (clip * jax.lax.rsqrt(jnp.maximum(mean_square, clip**2)))).astype(smashed.dtype)


def _exact(smashed: Array) -> Array:
    return smashed.astype(jnp.promote_types(smashed.dtype, jnp.float32))
