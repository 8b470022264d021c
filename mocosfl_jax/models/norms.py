"""Norms in several forms, each fast on some platform; all give the same numbers.

Images are NHWC. No norm has running statistics. `forms.forms` chooses the form of the group norm.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

CHANNELS_PER_GROUP = 4
EPSILON = 1e-5  # added to variances, PyTorch's default


class GroupNorm(Protocol):
    """A form of the group norm. All forms compute the same function."""

    def __call__(self, x: Array, scale: Array, bias: Array, group: int) -> Array: ...


class ImageBatchNorm(Protocol):
    """A form of the batch norm of images. All forms compute the same function."""

    def __call__(self, x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]: ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def group_norm(x: Array, scale: Array, bias: Array, group: int = CHANNELS_PER_GROUP) -> Array:
    """Group normalisation (Wu and He 2018) of `x` [n, H, W, C] with `group` channels per group.

    `scale` and `bias` are [C], and the computation is in their dtype. The result and the gradient of `x` are
    rounded to the dtype of `x`, which may be bfloat16. The variance takes two passes, since in float32 the
    difference of two large means would cancel. This is the form for a CPU.
    """
    return _group_norm_fwd(x, scale, bias, group)[0]


# Means are taken over the pixels of each channel and then over the channels of a group, and the norm is
# applied as x * a + b. On a CPU this is several times faster than reshaping x into groups.


def _group_norm_fwd(x: Array, scale: Array, bias: Array, group: int) -> tuple[Array, tuple[Array, ...]]:
    dtype, x_as_given = x.dtype, x
    x = x.astype(scale.dtype)
    mean = _group_mean(_pixel_mean(x), group)
    variance = _group_mean(_pixel_mean(jnp.square(x - mean)), group)
    inverse = jax.lax.rsqrt(variance + EPSILON)
    scale, bias = scale.reshape(1, 1, 1, -1), bias.reshape(1, 1, 1, -1)
    a = scale * inverse
    return (x * a + (bias - mean * a)).astype(dtype), (x_as_given, mean, inverse, scale)


def _group_norm_bwd(group: int, saved: tuple[Array, ...], grad: Array) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = saved
    dtype = x.dtype
    x, grad = x.astype(scale.dtype), grad.astype(scale.dtype)
    pixels = x.shape[1] * x.shape[2]
    of_bias = _pixel_mean(grad)  # for each image
    of_scale = _pixel_mean(grad * (x - mean)) * inverse
    # The parts of the gradient that would change a group's mean or its variance are removed.
    shift = _group_mean(scale * of_bias, group)
    stretch = _group_mean(scale * of_scale, group) * inverse
    of_x = inverse * (grad * scale - shift - (x - mean) * stretch)
    of_scale, of_bias = (pixels * jnp.sum(mean, axis=(0, 1, 2)) for mean in (of_scale, of_bias))
    return of_x.astype(dtype), of_scale, of_bias


group_norm.defvjp(_group_norm_fwd, _group_norm_bwd)


def _pixel_mean(x: Array) -> Array:
    """The mean over pixels, [n, H, W, C] -> [n, 1, 1, C]."""
    n, height, width, channels = x.shape
    return _mean(x.reshape(n, height * width, channels)).reshape(n, 1, 1, channels)


def _mean(x: Array) -> Array:
    """The mean over rows, [n, rows, C] -> [n, C]. Adding halves lets XLA vectorise the sum."""
    rows = x.shape[1]
    while x.shape[1] > 1 and x.shape[1] % 2 == 0:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return jnp.sum(x, axis=1) / rows


def _group_mean(per_channel: Array, group: int) -> Array:
    """[n, 1, 1, C] -> [n, 1, 1, C]: every channel gets the mean of its group of `group` channels."""
    groups = per_channel.reshape(per_channel.shape[0], 1, 1, -1, group)
    means = jnp.mean(groups, axis=-1, keepdims=True)
    return jax.lax.optimization_barrier(jnp.broadcast_to(means, groups.shape).reshape(per_channel.shape))


def fused_group_norm(x: Array, scale: Array, bias: Array, group: int = CHANNELS_PER_GROUP) -> Array:
    """`group_norm` in a form that accelerators fuse with the convolutions before and after it.

    Mean and mean square are sums of one pass over the pixels, and only these sums are reshaped into groups.
    By the estimate of the compiler for a TPU v5e, convolution, norm, ReLU and convolution on
    [200, 32, 32, 64] bfloat16, forward and backward, take 1.6 M cycles, against 3.6 M with `group_norm`.

    The variance is a difference, which cancels where a mean is large. Of bfloat16 images that costs less than
    their rounding did. Other images are first shifted by the mean of their first row of pixels.
    """
    dtype = x.dtype
    x = x.astype(scale.dtype)

    def group_mean(x: Array) -> Array:
        """Every channel gets the mean of the pixels of its group, [n, 1, 1, C]."""
        groups = jnp.mean(x, axis=(1, 2), keepdims=True).reshape(x.shape[0], 1, 1, -1, group)
        means = jnp.mean(groups, axis=-1, keepdims=True)
        return jnp.broadcast_to(means, groups.shape).reshape(x.shape[0], 1, 1, -1)

    if dtype != jnp.bfloat16:  # the result does not depend on the shift, so it needs no gradient
        x = x - group_mean(jax.lax.stop_gradient(x[:, :1]))
    mean, square = group_mean(x), group_mean(jnp.square(x))
    a = scale.reshape(1, 1, 1, -1) * jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + EPSILON)
    return (x * a + (bias.reshape(1, 1, 1, -1) - mean * a)).astype(dtype)


def image_batch_norm(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """Batch normalisation of `x` [n, H, W, C] by mean and biased variance of each channel.

    This is the form for accelerators.

    Returns:
      The result, and the mean and the variance [C], for running statistics. These two carry no gradient.
    """
    mean, variance = jnp.mean(x, axis=(0, 1, 2)), jnp.var(x, axis=(0, 1, 2))
    statistics = jax.lax.stop_gradient((mean, variance))
    return affine(x, scale, bias, mean, variance), *statistics


def affine(x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Array:
    """`x` [n, H, W, C] normalised by a given mean and variance [C]."""
    a = scale * jax.lax.rsqrt(variance + EPSILON)
    return x * _channels(a) + _channels(bias - mean * a)


@jax.custom_vjp
def cpu_image_batch_norm(x: Array, scale: Array, bias: Array) -> tuple[Array, Array, Array]:
    """`image_batch_norm` in a form that is several times faster on a CPU.

    XLA sums over the rows of a matrix one number at a time; sums of halves are vectorised.
    """
    return _batch_norm_fwd(x, scale, bias)[0]


def _batch_norm_fwd(
    x: Array, scale: Array, bias: Array
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    mean = _batch_mean(x)
    variance = _batch_mean(jnp.square(x - _channels(mean)))
    return (affine(x, scale, bias, mean, variance), mean, variance), (x, scale, mean, variance)


def _batch_norm_bwd(
    saved: tuple[Array, ...], grads: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    x, scale, mean, variance = saved
    grad, *_ = grads
    inverse = jax.lax.rsqrt(variance + EPSILON)
    normalised = (x - _channels(mean)) * _channels(inverse)
    of_bias, of_scale = _batch_mean(grad), _batch_mean(grad * normalised)
    # The parts of the gradient that would change a mean or a variance are removed.
    of_x = _channels(scale * inverse) * (grad - _channels(of_bias) - normalised * _channels(of_scale))
    count = x.size // x.shape[-1]
    return of_x, count * of_scale, count * of_bias


cpu_image_batch_norm.defvjp(_batch_norm_fwd, _batch_norm_bwd)


def _batch_mean(x: Array) -> Array:
    """The mean over images and pixels, [n, H, W, C] -> [C].

    First over the pixels of each image, since the images may be sharded over devices.
    """
    of_images = jax.lax.optimization_barrier(_mean(x.reshape(x.shape[0], -1, x.shape[-1])))
    return jnp.mean(of_images, axis=0)


def _channels(x: Array) -> Array:
    """[C] -> [1, 1, 1, C]."""
    return x.reshape(1, 1, 1, -1)


def batch_norm(x: Array, scale: Array, bias: Array) -> Array:
    """Batch normalisation of `x` [..., n, D] by mean and biased variance of its n rows, in evaluation too."""
    centred = x - jnp.mean(x, axis=-2, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-2, keepdims=True)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return centred * jax.lax.rsqrt(variance + EPSILON) * scale.reshape(shape) + bias.reshape(shape)
