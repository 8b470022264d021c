"""The layers that all networks share: convolutions, norms, max-pool and projection head.

Each is a function of one model; `jax.vmap` over stacked parameters makes it one batched operation. Images are
NHWC and kernels HWIO. No layer has running statistics.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from mocosfl_jax.models.convolution import Convolution, depthwise_conv, transposed_conv, windows
from mocosfl_jax.models.norms import CHANNELS_PER_GROUP, GroupNorm, batch_norm

NORMS = ("group", "layer", "instance")
HEADS = ("linear", "mlp", "mlp_bn")
INITS = ("official", "xavier")

Initializer = Callable[..., Array]  # rng, shape, dtype -> values


def max_pool(x: Array) -> Array:
    """2x2 max-pool of `x` [n, H, W, C]. The first of equal pixels takes the gradient, as in PyTorch.

    Comparing slices takes half the time of a reduction over windows, forward and backward.
    """
    largest, *others = windows(x, 2, 2, 2)
    for other in others:
        largest = jnp.where(other > largest, other, largest)
    return largest


def standardise(kernel: Array) -> Array:
    """Weight standardisation: each output channel minus its mean, divided by (its std + 1e-5).

    The std has ddof 1, as in the official code.

    Args:
      kernel: [kh, kw, in, out].
    """
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    return centred / (jnp.std(kernel, axis=(0, 1, 2), ddof=1, keepdims=True) + 1e-5)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings that all layers on one side of the cut share."""

    conv: Convolution  # the form of convolutions
    group_norm: GroupNorm  # the form of norms
    weight_standardisation: bool
    norm: str  # one of NORMS
    residual: bool  # whether blocks have shortcuts
    dtype: DTypeLike | None = None  # of activations and products; None keeps that of the images
    init: str = "official"  # one of INITS

    def standardised(self, yes: bool = True) -> "Options":
        """These options with, or without, weight standardisation."""
        return dataclasses.replace(self, weight_standardisation=yes)

    def initializers(self, fan_in: int) -> tuple[Initializer, Initializer]:
        """How the kernel and the bias of a convolution are drawn, as in the official code.

        Its initialisation, Xavier with zero biases, passes over the weight-standardised convolutions, since
        these are a subclass: they keep PyTorch's default, in which both are uniform in +-1 / sqrt(fan_in).
        """
        if self.init == "official" and self.weight_standardisation:
            default = uniform(fan_in**-0.5)
            return default, default
        return nn.initializers.xavier_uniform(), nn.initializers.zeros

    def cast(self, x: Array) -> Array:
        """`x` in the dtype of the activations."""
        return x if self.dtype is None else x.astype(self.dtype)


def uniform(bound: float) -> Initializer:
    """Draws from the uniform distribution on [-bound, bound)."""

    def draw(rng: Array, shape: Sequence[int], dtype: DTypeLike = float) -> Array:
        return jax.random.uniform(rng, shape, dtype, -bound, bound)

    return draw


class Conv(nn.Module):
    """Convolution with zero padding of kernel_size // 2, weight-standardised if the options say so.

    The kernel is stored and standardised in its own dtype. It is rounded to the dtype of the options for the
    product only.
    """

    features: int
    kernel_size: int
    stride: int
    options: Options
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        init_kernel, init_bias = self.options.initializers(fan_in=math.prod(shape[:3]))
        kernel = self.param("kernel", init_kernel, shape)
        if self.options.weight_standardisation:
            kernel = standardise(kernel)
        x, kernel = self.options.cast(x), self.options.cast(kernel)
        x = self.options.conv(x, kernel, stride=self.stride, padding=self.kernel_size // 2)
        return _add_bias(self, x, init_bias) if self.bias else x


class DepthwiseConv(nn.Module):
    """3x3 convolution of each channel by itself, weight-standardised if the options say so."""

    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init_kernel, _ = self.options.initializers(fan_in=3 * 3)
        kernel = self.param("kernel", init_kernel, (3, 3, 1, x.shape[-1]))
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
        return _add_bias(self, transposed_conv(x, kernel), nn.initializers.zeros)


def _add_bias(module: nn.Module, x: Array, init: Initializer) -> Array:
    bias = module.param("bias", init, (x.shape[-1],))
    # Rounding the sum only keeps the gradient of the bias, a sum over all pixels, in full precision.
    return (x + bias.reshape(1, 1, 1, -1)).astype(x.dtype)


class Norm(nn.Module):
    """Group, layer (one group of all channels) or instance norm (one group per channel)."""

    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        group = {"group": CHANNELS_PER_GROUP, "layer": channels, "instance": 1}[self.options.norm]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return self.options.group_norm(x, scale, bias, group)


class BatchNorm(nn.Module):
    """`batch_norm` with parameters scale [D] and bias [D]."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return batch_norm(x, scale, bias)


class ProjectionHead(nn.Module):
    """MoCo's projection head: linear D -> key_dim (V1), or an MLP with one hidden layer (V2).

    With `batch_norm` the hidden layer is normalised by the current batch, also when images are only encoded.
    The projection of an image then depends on the other images of its batch, and `split_model`
    refuses a batch of one image. Pooled features do not.
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
                precision=jax.lax.Precision.HIGHEST,  # as in PyTorch, where only convolutions may round
                name=name,
            )

        if self.hidden_dim is not None:
            x = dense(self.hidden_dim, "hidden")(x)
            x = nn.relu(BatchNorm(name="norm")(x) if self.batch_norm else x)
        return dense(self.key_dim, "out")(x)


def shortcut(x: Array, features: int, stride: int, options: Options) -> Array:
    """The identity, or a 1x1 convolution and norm if the shape changes."""
    if stride == 1 and x.shape[-1] == features:
        return x
    x = Conv(features, 1, stride, options, name="shortcut_conv")(x)
    return Norm(options, name="shortcut_norm")(x)
