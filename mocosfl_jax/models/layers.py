"""The layers of which every network here is made: norms, max-pool, projection head.

Each is a function for one model; `jax.vmap` over stacked parameters makes it one batched operation.
Images are NHWC, kernels HWIO. No layer carries running statistics.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mocosfl_jax.models.convolution import Convolution, depthwise_conv, transposed_conv, windows

CHANNELS_PER_GROUP = 4
NORMS = ("group", "layer", "instance")
HEADS = ("linear", "mlp", "mlp_bn")


def max_pool(x: Array) -> Array:
    """2x2 max-pool of `x` [n, H, W, C]; of equals the first takes the gradient, as in PyTorch.

    Comparisons of slices: forward and backward take half the time of a reduction over windows.
    """
    largest, *others = windows(x, 2, 2, 2)
    for other in others:
        largest = jnp.where(other > largest, other, largest)
    return largest


def standardise(kernel: Array) -> Array:
    """Weight standardisation: each output channel minus its mean, over (its std + 1e-5).

    The std has ddof 1, as in the official code.

    Args:
      kernel: [kh, kw, in, out].
    """
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    return centred / (jnp.std(kernel, axis=(0, 1, 2), ddof=1, keepdims=True) + 1e-5)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(
    x: Array, scale: Array, bias: Array, group: int = CHANNELS_PER_GROUP, epsilon: float = 1e-5
) -> Array:
    """Group normalisation (Wu and He 2018) of `x` [n, H, W, C] with `group` channels a group.

    `scale` and `bias` are [C]. The variance takes two passes, since the difference of two large means
    would cancel in float32. All is computed in their dtype; the result and the gradient of `x` are
    rounded to that of `x`, which may be bfloat16.
    """
    return _group_norm_fwd(x, scale, bias, group, epsilon)[0]


# Means are taken per channel over the pixels first and then over the channels of a group, and the norm is
# applied as x * a + b: several times faster on a CPU than reshaping x into groups.


def _group_norm_fwd(
    x: Array, scale: Array, bias: Array, group: int, epsilon: float
) -> tuple[Array, tuple[Array, ...]]:
    dtype, x_as_given = x.dtype, x
    x = x.astype(scale.dtype)
    mean = _group_mean(_pixel_mean(x), group)
    variance = _group_mean(_pixel_mean(jnp.square(x - mean)), group)
    inverse = jax.lax.rsqrt(variance + epsilon)
    scale, bias = scale.reshape(1, 1, 1, -1), bias.reshape(1, 1, 1, -1)
    a = scale * inverse
    return (x * a + (bias - mean * a)).astype(dtype), (x_as_given, mean, inverse, scale)


def _group_norm_bwd(
    group: int, epsilon: float, saved: tuple[Array, ...], grad: Array
) -> tuple[Array, Array, Array]:
    x, mean, inverse, scale = saved
    dtype = x.dtype
    x, grad = x.astype(scale.dtype), grad.astype(scale.dtype)
    pixels = x.shape[1] * x.shape[2]
    of_bias = _pixel_mean(grad)  # of each image
    of_scale = _pixel_mean(grad * (x - mean)) * inverse
    # What the gradient does to a group's mean and to its variance cancels out.
    shift = _group_mean(scale * of_bias, group)
    stretch = _group_mean(scale * of_scale, group) * inverse
    of_x = inverse * (grad * scale - shift - (x - mean) * stretch)
    of_scale, of_bias = (pixels * jnp.sum(mean, axis=(0, 1, 2)) for mean in (of_scale, of_bias))
    return of_x.astype(dtype), of_scale, of_bias


group_norm.defvjp(_group_norm_fwd, _group_norm_bwd)


def _pixel_mean(x: Array) -> Array:
    """[n, H, W, C] -> [n, 1, 1, C]. Halves are added as long as there are any, which XLA vectorises."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height * width, channels)
    while x.shape[1] > 1 and x.shape[1] % 2 == 0:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return jnp.sum(x, axis=1).reshape(n, 1, 1, channels) / (height * width)


def _group_mean(per_channel: Array, group: int) -> Array:
    """[n, 1, 1, C] -> the same shape, every channel with the mean of its group of `group` channels."""
    groups = per_channel.reshape(len(per_channel), 1, 1, -1, group)
    means = jnp.mean(groups, axis=-1, keepdims=True)
    return jax.lax.optimization_barrier(jnp.broadcast_to(means, groups.shape).reshape(per_channel.shape))


def batch_norm(x: Array, scale: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    """Batch normalisation of `x` [..., n, D] by mean and (biased) variance of its n rows, at all times."""
    centred = x - jnp.mean(x, axis=-2, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-2, keepdims=True)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return centred * jax.lax.rsqrt(variance + epsilon) * scale.reshape(shape) + bias.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the layers on one side of the cut have in common."""

    conv: Convolution  # how convolutions are computed
    weight_standardisation: bool
    norm: str  # one of NORMS
    residual: bool  # whether blocks have shortcuts
    dtype: DTypeLike | None = None  # of activations and products; None: that of the parameters and images

    def standardised(self, yes: bool = True) -> "Options":
        """The same with weight standardisation, or without."""
        return dataclasses.replace(self, weight_standardisation=yes)

    def cast(self, x: Array) -> Array:
        """`x` in the dtype of the activations."""
        return x if self.dtype is None else x.astype(self.dtype)


class Layer(NamedTuple):
    """One of the layers between which a network can be cut."""

    module: Callable[..., nn.Module]  # waits for `options`
    channels: int  # that leave it


class Conv(nn.Module):
    """Convolution zero-padded by kernel_size // 2, weight-standardised if the options say so.

    The kernel is kept and standardised in its own dtype, and rounded to the options' only for the product.
    """

    features: int
    kernel_size: int
    stride: int
    options: Options
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        if self.options.weight_standardisation:
            kernel = standardise(kernel)
        x, kernel = self.options.cast(x), self.options.cast(kernel)
        x = self.options.conv(x, kernel, stride=self.stride, padding=self.kernel_size // 2)
        return _add_bias(self, x) if self.bias else x


class DepthwiseConv(nn.Module):
    """3x3 convolution of each channel by itself, weight-standardised if the options say so."""

    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (3, 3, 1, x.shape[-1]))
        if self.options.weight_standardisation:
            kernel = standardise(kernel)
        return depthwise_conv(self.options.cast(x), kernel, stride=self.stride, padding=1)


class TransposedConv(nn.Module):
    """`transposed_conv` with kernel and bias."""

    features: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        x, kernel = self.options.cast(x), self.options.cast(kernel)
        return _add_bias(self, transposed_conv(x, kernel, self.options.conv))


def _add_bias(module: nn.Module, x: Array) -> Array:
    bias = module.param("bias", nn.initializers.zeros, (x.shape[-1],))
    # Only the sum is rounded, so that the gradient of the bias, a sum over all pixels, is not.
    return (x + bias.reshape(1, 1, 1, -1)).astype(x.dtype)


class Norm(nn.Module):
    """Group, layer (one group of all channels) or instance norm (a group a channel); scale and bias [C]."""

    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        group = {"group": CHANNELS_PER_GROUP, "layer": channels, "instance": 1}[self.options.norm]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return group_norm(x, scale, bias, group)


class BatchNorm(nn.Module):
    """`batch_norm` with its scale and bias, both [D]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return batch_norm(x, scale, bias)


class ProjectionHead(nn.Module):
    """MoCo's projection head: linear D -> key_dim (V1), or an MLP with one hidden layer (V2).

    With `batch_norm` the hidden layer is normalised by the batch at hand, also where images are only
    encoded: their projections then depend on the company they are in (pooled features do not).
    """

    key_dim: int
    hidden_dim: int | None
    batch_norm: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(
                features,
                kernel_init=nn.initializers.xavier_uniform(),
                precision=jax.lax.Precision.HIGHEST,  # as PyTorch has it; only convolutions may round
                name=name,
            )

        if self.hidden_dim is not None:
            x = dense(self.hidden_dim, "hidden")(x)
            x = nn.relu(BatchNorm(name="norm")(x) if self.batch_norm else x)
        return dense(self.key_dim, "out")(x)
