"""A linear attacker: ridge regression from smashed data to pixels, in closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from mocosfl_jax.errors import UserError

# Relative to the mean eigenvalue of the smashed data's covariance; smaller ones drown in float32's rounding.
PENALTIES = tuple(float(penalty) for penalty in np.logspace(-4, 3, 15))
MOST_VALIDATION = 500  # images by which the penalty is chosen
_DIMENSIONS = 8192  # of the linear system; a larger one would take minutes


def ridge(
    rngs: Array,
    smashed: ArrayLike,
    images: ArrayLike,
    victims: ArrayLike,
    *,
    penalties: tuple[float, ...] = PENALTIES,
    validation: float = 0.1,
) -> Array:
    """Reconstruct the victims' images by ridge regression on the attackers' images.

    Each number of the smashed data is first divided by its standard deviation over the attacker's images:
    channels of small values may say as much as those of large ones.
    The penalty is the one with the smallest error on held-out images. The linear system has as many equations
    as images or as numbers of smashed data, whichever are fewer.

    Args:
      rngs: [A] keys, for the held-out images.
      smashed: [A, n, h, w, c] smashed data of the attackers' images.
      images: [A, n, H, W, 3] uint8.
      victims: [A, m, h, w, c] smashed data.
      penalties: to choose from, relative to the mean eigenvalue of the covariance.
      validation: share of the images that are held out, at most `MOST_VALIDATION`.

    Returns:
      [A, m, H, W, 3] float32, clipped to [0, 1].

    Raises:
      UserError: if there are fewer than 4 images, or the system is too large.

    Example:
      >>> images = np.random.default_rng(0).integers(0, 256, (1, 40, 2, 2, 3), np.uint8)
      >>> smashed = images / np.float32(255)  # what a client without layers sends
      >>> found = ridge(jax.random.split(jax.random.key(0), 1), smashed, images, smashed[:, :5])
      >>> bool(jnp.max(jnp.abs(found - smashed[:, :5])) < 0.01)
      True
    """
    smashed, images, victims = jnp.asarray(smashed), jnp.asarray(images), jnp.asarray(victims)
    count, numbers = images.shape[1], int(np.prod(smashed.shape[2:]))
    if count < 4:
        raise UserError(f"attacker's images: found {count}, allowed: 4 or more")
    if min(count, numbers) > _DIMENSIONS:
        raise UserError(
            f"attacker's images: found {count:,} with {numbers:,} numbers of smashed data each, "
            f"allowed: {_DIMENSIONS:,} images or numbers for ridge regression"
        )
    held_out = min(max(1, round(validation * count)), MOST_VALIDATION)
    with jax.default_matmul_precision("highest"):
        return _ridge(rngs, smashed, images, victims, penalties=penalties, held_out=held_out)


@partial(jax.jit, static_argnames=("penalties", "held_out"))
def _ridge(
    rngs: Array,
    smashed: Array,
    images: Array,
    victims: Array,
    *,
    penalties: tuple[float, ...],
    held_out: int,
) -> Array:
    one = partial(_one, penalties=penalties, held_out=held_out)
    return jax.vmap(one)(rngs, smashed, images, victims)


def _one(
    rng: Array,
    smashed: Array,
    images: Array,
    victims: Array,
    *,
    penalties: tuple[float, ...],
    held_out: int,
) -> Array:
    """`ridge` of one attacker."""
    order = jax.random.permutation(rng, len(images))
    x = smashed.reshape(len(smashed), -1)[order]
    y = (images.astype(x.dtype) / 255).reshape(len(images), -1)[order]
    z = victims.reshape(len(victims), -1)
    x_validation, y_validation, x, y = x[:held_out], y[:held_out], x[held_out:], y[held_out:]
    mean_x, mean_y = jnp.mean(x, axis=0, keepdims=True), jnp.mean(y, axis=0, keepdims=True)
    scale = jnp.std(x, axis=0, keepdims=True)
    scale = jnp.where(scale > 0, scale, 1)  # a number that never changes, such as that of a dead channel
    x, y = (x - mean_x) / scale, y - mean_y
    # With x = U S V', the prediction for a row z is (z V) / (S^2 + penalty) (V' x' y), and V S = x' U.
    if len(x) >= x.shape[1]:
        squares, basis = jnp.linalg.eigh(x.T @ x)
        weights = basis.T @ (x.T @ y)
    else:
        squares, dual = jnp.linalg.eigh(x @ x.T)
        basis = x.T @ dual
        weights = dual.T @ y

    def predict(rows: Array, penalty: Array) -> Array:
        factors = 1 / (jnp.maximum(squares, 0) + penalty)
        return ((rows - mean_x) / scale @ basis * factors[None]) @ weights + mean_y

    mean_square = jnp.mean(jnp.maximum(squares, 0))
    grid = jnp.asarray(penalties, x.dtype) * jnp.where(mean_square > 0, mean_square, 1)
    errors = jax.lax.map(lambda p: jnp.mean(jnp.square(predict(x_validation, p) - y_validation)), grid)
    found = predict(z, grid[jnp.argmin(errors)])
    return jnp.clip(found, 0, 1).reshape(len(z), *images.shape[1:])
