"""How similar two images are. All functions take images in [0, 1] and return one number for each image."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

WINDOW = 11  # pixels
SIGMA = 1.5  # pixels
LEAST_MSE = 1e-10  # of `psnr`
C1, C2 = 0.01**2, 0.03**2  # for values in [0, 1]


def mse(images: ArrayLike, others: ArrayLike) -> Array:
    """Mean squared error of each image.

    Args:
      images: [..., H, W, 3] in [0, 1].
      others: the same shape.

    Returns:
      [...], the means over pixels and channels.

    Example:
      >>> mse(jnp.zeros((2, 4, 4, 3)), jnp.full((2, 4, 4, 3), 0.5)).tolist()
      [0.25, 0.25]
    """
    return jnp.mean(jnp.square(jnp.asarray(images) - jnp.asarray(others)), axis=(-3, -2, -1))


def psnr(images: ArrayLike, others: ArrayLike) -> Array:
    """Peak signal-to-noise ratio of each image in decibels, 10 log10(1 / MSE).

    MSEs below 1e-10 count as 1e-10, so that equal images have 100 decibels, and means and JSON are finite.

    Args:
      images: [..., H, W, 3] in [0, 1].
      others: the same shape.

    Returns:
      [...].

    Example:
      >>> psnr(jnp.zeros((1, 4, 4, 3)), jnp.full((1, 4, 4, 3), 0.1)).round(3).tolist()
      [20.0]
    """
    return -10 * jnp.log10(jnp.maximum(mse(images, others), LEAST_MSE))


def ssim(images: ArrayLike, others: ArrayLike) -> Array:
    """Structural similarity of each image (Wang et al. 2004): 1 for equal images.

    The window is Gaussian, 11x11 pixels with a sigma of 1.5. It is applied to each channel by itself, and
    beyond the border lie zeros, as in the official code.

    Args:
      images: [..., H, W, 3] in [0, 1].
      others: the same shape.

    Returns:
      [...], the means over pixels and channels.

    Example:
      >>> images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
      >>> ssim(images, images).tolist()
      [1.0, 1.0]
    """
    return jnp.mean(ssim_map(images, others), axis=(-3, -2, -1))


def ssim_map(images: ArrayLike, others: ArrayLike) -> Array:
    """Structural similarity around each pixel, see `ssim`.

    Args:
      images: [..., H, W, 3] in [0, 1].
      others: the same shape.

    Returns:
      [..., H, W, 3].
    """
    x, y = jnp.asarray(images), jnp.asarray(others)
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x * mean_x
    var_y = _window_mean(y * y) - mean_y * mean_y
    cov = _window_mean(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x * mean_x + mean_y * mean_y + C1)
    structure = (2 * cov + C2) / (var_x + var_y + C2)
    return luminance * structure


def _window_mean(images: Array) -> Array:
    """The weighted mean around each pixel. The window is a product, so it is one matrix product per axis."""
    rows, columns = (jnp.asarray(_window_matrix(size), images.dtype) for size in images.shape[-3:-1])
    return jnp.einsum("Hh,Ww,...hwc->...HWc", rows, columns, images, precision=jax.lax.Precision.HIGHEST)


def _window_matrix(size: int) -> np.ndarray:
    """[size, size]: row i holds the weights of all pixels around pixel i, along one axis."""
    distance = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(distance**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    offset = np.arange(size)[None, :] - np.arange(size)[:, None] + WINDOW // 2
    return np.where((offset >= 0) & (offset < WINDOW), weights[offset.clip(0, WINDOW - 1)], 0)
