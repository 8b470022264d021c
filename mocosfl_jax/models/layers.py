"""The layers of which every network here is made: weight-standardised convolution and group norm.

Each is a function for one model; `jax.vmap` over stacked parameters makes it one batched operation.
Images are NHWC, kernels HWIO.
"""

from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

CHANNELS_PER_GROUP = 4


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
    height = (x.shape[1] - kh) // stride + 1
    width = (x.shape[2] - kw) // stride + 1
    windows = [
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(kh)
        for j in range(kw)
    ]
    patches = jnp.concatenate(windows, axis=-1)
    return patches @ kernel.reshape(kh * kw * channels, features)


def standardise(kernel: Array) -> Array:
    """Weight standardisation: each output channel minus its mean, over (its std + 1e-5).

    The std has ddof 1, as in the official code.

    Args:
      kernel: [kh, kw, in, out].
    """
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    return centred / (jnp.std(kernel, axis=(0, 1, 2), ddof=1, keepdims=True) + 1e-5)


def group_norm(x: Array, scale: Array, bias: Array, *, epsilon: float = 1e-5) -> Array:
    """Group normalisation (Wu and He 2018) of `x` [n, H, W, C] with four channels a group.

    Means are taken per channel over (H, W) first and then over the four channels, and the norm is
    applied as x * a + b: several times faster on a CPU than reshaping x into groups. The variance
    takes two passes, since the difference of two large means would cancel in float32.
    """

    def group_mean(per_channel: Array) -> Array:
        groups = per_channel.reshape(x.shape[0], 1, 1, -1, CHANNELS_PER_GROUP)
        means = jnp.mean(groups, axis=-1, keepdims=True)
        return jnp.broadcast_to(means, groups.shape).reshape(per_channel.shape)

    mean = group_mean(jnp.mean(x, axis=(1, 2), keepdims=True))
    variance = group_mean(jnp.mean(jnp.square(x - mean), axis=(1, 2), keepdims=True))
    a = scale.reshape(1, 1, 1, -1) * jax.lax.rsqrt(variance + epsilon)
    return x * a + (bias.reshape(1, 1, 1, -1) - mean * a)


class WSConv(nn.Module):
    """Weight-standardised convolution without bias, zero-padded by kernel_size // 2."""

    features: int
    kernel_size: int
    stride: int
    conv: Convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        return self.conv(x, standardise(kernel), stride=self.stride, padding=self.kernel_size // 2)


class GroupNorm(nn.Module):
    """`group_norm` with its scale and bias, both [C]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return group_norm(x, scale, bias)


class ProjectionHead(nn.Module):
    """MoCo's projection head: linear D -> key_dim (V1), or an MLP with one hidden layer (V2)."""

    key_dim: int
    hidden_dim: int | None

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
            x = nn.relu(dense(self.hidden_dim, "hidden")(x))
        return dense(self.key_dim, "out")(x)
