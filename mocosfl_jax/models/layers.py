"""The layers of which every network here is made: convolutions, norms, max-pool, projection head.

Each is a function for one model; `jax.vmap` over stacked parameters makes it one batched operation.
Images are NHWC, kernels HWIO. No layer carries running statistics.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

CHANNELS_PER_GROUP = 4
NORMS = ("group", "layer", "instance")
HEADS = ("linear", "mlp", "mlp_bn")


class Convolution(Protocol):
    """How a convolution is computed; what it computes is the same for all of them."""

    def __call__(self, x: Array, kernel: Array, *, stride: int, padding: int) -> Array: ...


def direct_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """Convolution of `x` [n, H, W, in] with `kernel` [kh, kw, in, out], zero padding on every side."""
    if (x.shape[1] + 2 * padding - kernel.shape[0]) // stride + 1 < kernel.shape[0]:
        # XLA would exchange image and kernel where the output is the smaller of the two, and then
        # take ten times as long as a matmul does (2x2 images of 128 channels, on a CPU).
        return patches_conv(x, kernel, stride=stride, padding=padding)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def patches_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """`direct_conv` as one matmul over patches.

    Under `vmap` over kernels it becomes a batched matmul, where a convolution would become a grouped
    one, which is some two hundred times slower on a CPU. Hence the client-side models use it.
    """
    kh, kw, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    patches = jnp.concatenate(_windows(x, kh, kw, stride), axis=-1)
    return patches @ kernel.reshape(kh * kw * channels, features)


def _windows(x: Array, kh: int, kw: int, stride: int) -> list[Array]:
    """What lies under each of the kh * kw entries of a kernel, row by row, wherever the kernel is put."""
    height = (x.shape[1] - kh) // stride + 1
    width = (x.shape[2] - kw) // stride + 1
    return [
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]


def depthwise_conv(x: Array, kernel: Array, *, stride: int, padding: int) -> Array:
    """Convolution of each channel of `x` [n, H, W, C] with its own slice of `kernel` [kh, kw, 1, C].

    Shifts, multiplications and additions: on a CPU seventeen times as fast as a grouped convolution
    (8 and 132 ms for [200, 16, 16, 96] on two cores), and still faster with its gradients.
    """
    kh, kw, _, channels = kernel.shape
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    weights = kernel.reshape(kh * kw, 1, 1, 1, channels)
    return sum(
        (window * weight for window, weight in zip(_windows(x, kh, kw, stride), weights, strict=True)),
        start=jnp.zeros((), x.dtype),
    )


def transposed_conv(x: Array, kernel: Array, conv: Convolution) -> Array:
    """Transposed 3x3 convolution of stride 2: pixel (y, x) adds to the 3x3 pixels around (2y, 2x).

    PyTorch's ConvTranspose2d with padding 1 and output padding 1: `x` [n, H, W, in] and `kernel`
    [3, 3, in, out] give [n, 2H, 2W, out].
    """
    zero = jnp.zeros((), x.dtype)
    stuffed = jax.lax.pad(x, zero, ((0, 0, 0), (1, 2, 1), (1, 2, 1), (0, 0, 0)))
    return conv(stuffed, kernel[::-1, ::-1], stride=1, padding=0)


def max_pool(x: Array) -> Array:
    """2x2 max-pool of `x` [n, H, W, C]; of equals the first takes the gradient, as in PyTorch.

    Comparisons of slices: forward and backward take half the time of a reduction over windows.
    """
    largest, *others = _windows(x, 2, 2, 2)
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


def group_norm(
    x: Array, scale: Array, bias: Array, *, group: int = CHANNELS_PER_GROUP, epsilon: float = 1e-5
) -> Array:
    """Group normalisation (Wu and He 2018) of `x` [n, H, W, C] with `group` channels a group.

    Means are taken per channel over (H, W) first and then over the channels of a group, and the norm is
    applied as x * a + b: several times faster on a CPU than reshaping x into groups. The variance
    takes two passes, since the difference of two large means would cancel in float32.
    """

    def group_mean(per_channel: Array) -> Array:
        groups = per_channel.reshape(x.shape[0], 1, 1, -1, group)
        means = jnp.mean(groups, axis=-1, keepdims=True)
        return jnp.broadcast_to(means, groups.shape).reshape(per_channel.shape)

    mean = group_mean(jnp.mean(x, axis=(1, 2), keepdims=True))
    variance = group_mean(jnp.mean(jnp.square(x - mean), axis=(1, 2), keepdims=True))
    a = scale.reshape(1, 1, 1, -1) * jax.lax.rsqrt(variance + epsilon)
    return x * a + (bias.reshape(1, 1, 1, -1) - mean * a)


def batch_norm(x: Array, scale: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    """Batch normalisation of `x` [n, D] by mean and (biased) variance of this batch, whatever it is for."""
    centred = x - jnp.mean(x, axis=0, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=0, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon) * scale.reshape(1, -1) + bias.reshape(1, -1)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the layers on one side of the cut have in common."""

    conv: Convolution  # how convolutions are computed
    weight_standardisation: bool
    norm: str  # one of NORMS
    residual: bool  # whether blocks have shortcuts

    def standardised(self, yes: bool = True) -> "Options":
        """The same with weight standardisation, or without."""
        return dataclasses.replace(self, weight_standardisation=yes)


class Layer(NamedTuple):
    """One of the layers between which a network can be cut."""

    module: Callable[..., nn.Module]  # waits for `options`
    channels: int  # that leave it


class Conv(nn.Module):
    """Convolution zero-padded by kernel_size // 2, weight-standardised if the options say so."""

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
        return depthwise_conv(x, kernel, stride=self.stride, padding=1)


class TransposedConv(nn.Module):
    """`transposed_conv` with kernel and bias."""

    features: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        return _add_bias(self, transposed_conv(x, kernel, self.options.conv))


def _add_bias(module: nn.Module, x: Array) -> Array:
    bias = module.param("bias", nn.initializers.zeros, (x.shape[-1],))
    return x + bias.reshape(1, 1, 1, -1)


class Norm(nn.Module):
    """Group, layer (one group of all channels) or instance norm (a group a channel); scale and bias [C]."""

    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        group = {"group": CHANNELS_PER_GROUP, "layer": channels, "instance": 1}[self.options.norm]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return group_norm(x, scale, bias, group=group)


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
