"""Decoders, which an attacker trains to turn smashed data back into images (model inversion).

The three families of Li et al. (ResSFL, CVPR 2022), which the official code uses too. All end in a sigmoid.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from mocosfl_jax.errors import UserError
from mocosfl_jax.models.convolution import Convolution, transposed_conv
from mocosfl_jax.models.forms import ACCELERATOR, Forms
from mocosfl_jax.models.layers import Initializer, uniform
from mocosfl_jax.models.norms import ImageBatchNorm, affine

Params = Any  # a tree of arrays
Statistics = Any  # a tree of arrays

MOMENTUM = 0.1  # share of a batch in the running statistics, PyTorch's default


class Decoder(NamedTuple):
    """A decoder as pure functions.

    Example:
      >>> import jax
      >>> decoder = make_decoder("conv_normN0C16", (16, 16, 4), image_size=32)
      >>> params, statistics = decoder.init(jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      5769
      >>> images, _ = decoder.apply(params, statistics, jnp.zeros((2, 16, 16, 4)), training=False)
      >>> images.shape
      (2, 32, 32, 3)
    """

    init: Callable[[Array], tuple[Params, Statistics]]  # rng -> parameters, running statistics
    # params, statistics, smashed data [n, h, w, c], training=... -> images [n, H, W, 3], statistics.
    # In training, batch norms use and record the batch; otherwise they use the statistics.
    apply: Callable[..., tuple[Array, Statistics]]


class Family(NamedTuple):
    """The meaning of a name such as "res_normN4C64"."""

    block: str  # res_norm, conv_norm or custom
    blocks: int = 0  # N, between the first block and the upsampling
    channels: int = 0  # C, of all layers but the first and the last


def read_family(name: str) -> Family:
    """Parse "res_normNxCy", "conv_normNxCy" or "custom".

    Example:
      >>> read_family("res_normN4C64")
      Family(block='res_norm', blocks=4, channels=64)

    Raises:
      UserError: If the name has another form.
    """
    if name == "custom":
        return Family(name)
    found = re.fullmatch(r"(res_norm|conv_norm)N(\d{1,2})C([1-9]\d{0,3})", name)
    if found is None:
        raise UserError(
            f"decoder: found {name!r}, allowed: res_normNxCy or conv_normNxCy with x blocks of y channels, "
            "such as res_normN4C64, or custom"
        )
    return Family(found[1], int(found[2]), int(found[3]))


def make_decoder(
    name: str,
    smashed_shape: tuple[int, int, int],
    image_size: int,
    forms: Forms = ACCELERATOR,
    *,
    stacked: bool = True,
    xavier: bool = False,
) -> Decoder:
    """A decoder of smashed data.

    Args:
      name: Its family, see `read_family`. The paper attacks with "res_normN4C64".
      smashed_shape: (h, w, c) of one image's smashed data.
      image_size: Height and width of the images in pixels: h times a power of two.
      forms: Of the platform.
      stacked: Whether several decoders are trained in a stack. It decides the form of the convolutions.
      xavier: Draw all kernels by Xavier with zero biases, as the official code draws the decoder that is
        trained against clients. Otherwise as PyTorch does by default, as it draws the one that attacks.

    Raises:
      UserError: If the name is wrong, or the images have another size.
    """
    family = read_family(name)
    height, width, channels = smashed_shape
    doublings = (image_size // height).bit_length() - 1 if height else 0
    if height != width or height << max(doublings, 0) != image_size:
        raise UserError(
            f"decoder: found smashed data of {height}x{width} and images of {image_size}x{image_size} "
            "pixels, allowed: images larger by a power of two"
        )
    if family.block == "custom" and channels < 2 ** max(doublings - 1, 0):
        raise UserError(f"decoder: found custom and {channels} channels, allowed: 2^{doublings - 1} or more")

    def network(training: bool) -> nn.Module:
        conv = forms.convolutions.stacked if stacked else forms.convolutions.single
        options = _Options(conv, forms.image_batch_norm, training, xavier)
        if family.block == "custom":
            return _Custom(doublings, options)
        return _Norm(family, doublings, options)

    def init(rng: Array) -> tuple[Params, Statistics]:
        variables = network(True).init(rng, jnp.zeros((1, *smashed_shape)))
        return variables["params"], variables.get("statistics", {})

    def apply(
        params: Params, statistics: Statistics, smashed: Array, *, training: bool
    ) -> tuple[Array, Statistics]:
        variables = {"params": params, "statistics": statistics}
        images: Any
        images, changed = network(training).apply(variables, smashed, mutable=["statistics"])
        return images, changed.get("statistics", {})

    return Decoder(init, apply)


@dataclasses.dataclass(frozen=True)
class _Options:
    conv: Convolution
    batch_norm: ImageBatchNorm
    training: bool  # whether batch norms use, and record, the statistics of the batch
    xavier: bool  # how kernels and biases are drawn

    def draws(self, fan_in: int, fan_out: int) -> tuple[Initializer, Initializer]:
        """How a kernel and its bias are drawn."""
        if self.xavier:
            return uniform((6 / (fan_in + fan_out)) ** 0.5), nn.initializers.zeros
        return (uniform(fan_in**-0.5),) * 2


class _Conv(nn.Module):
    """Convolution with padding kernel_size // 2."""

    features: int
    options: _Options
    kernel_size: int = 3
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size, channels = self.kernel_size, x.shape[-1]
        of_kernel, of_bias = self.options.draws(size * size * channels, size * size * self.features)
        kernel = self.param("kernel", of_kernel, (size, size, channels, self.features))
        x = self.options.conv(x, kernel, stride=1, padding=size // 2)
        return x + self.param("bias", of_bias, (self.features,)).reshape(1, 1, 1, -1) if self.bias else x


class _Upsampling(nn.Module):
    """`transposed_conv`, which doubles height and width."""

    features: int
    options: _Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # PyTorch stores [in, out, 3, 3] and takes the second axis for the inputs of a unit.
        of_kernel, of_bias = self.options.draws(3 * 3 * self.features, 3 * 3 * x.shape[-1])
        kernel = self.param("kernel", of_kernel, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", of_bias, (self.features,))
        return transposed_conv(x, kernel) + bias.reshape(1, 1, 1, -1)


class _BatchNorm(nn.Module):
    """PyTorch's BatchNorm2d: the running variance takes the unbiased variance of a batch."""

    options: _Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        running_mean = self.variable("statistics", "mean", jnp.zeros, shape)
        running_var = self.variable("statistics", "variance", jnp.ones, shape)
        if not self.options.training:
            return affine(x, scale, bias, running_mean.value, running_var.value)
        x, mean, var = self.options.batch_norm(x, scale, bias)
        if not self.is_initializing():
            count = x.size // x.shape[-1]
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value = (1 - MOMENTUM) * running_mean.value + MOMENTUM * mean
            running_var.value = (1 - MOMENTUM) * running_var.value + MOMENTUM * unbiased
        return x


class _ResBlock(nn.Module):
    """Two times norm, ReLU and convolution, and a shortcut. The caller applies the ReLU after the sum."""

    features: int
    options: _Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.relu(_BatchNorm(self.options, name="norm0")(x))
        y = _Conv(self.features, self.options, name="conv0")(y)
        y = nn.relu(_BatchNorm(self.options, name="norm1")(y))
        y = _Conv(self.features, self.options, name="conv1")(y)
        if x.shape[-1] != self.features:
            x = _Conv(self.features, self.options, kernel_size=1, bias=False, name="shortcut_conv")(x)
            x = _BatchNorm(self.options, name="shortcut_norm")(x)
        return x + y


class _ConvBlock(nn.Module):
    """Convolution, or a transposed one, and norm."""

    features: int
    options: _Options
    conv: Callable[..., nn.Module] = _Conv

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.conv(self.features, self.options, name="conv")(x)
        return _BatchNorm(self.options, name="norm")(x)


class _Norm(nn.Module):
    """The families res_norm and conv_norm."""

    family: Family
    doublings: int
    options: _Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        block: Callable[..., nn.Module] = {"res_norm": _ResBlock, "conv_norm": _ConvBlock}[self.family.block]
        upsampling = functools.partial(_ConvBlock, conv=_Upsampling)
        flat = [block] * (1 + self.family.blocks)
        # Two places for upsampling; a place that is not needed holds another block.
        up = [upsampling if i < self.doublings else block for i in range(max(2, self.doublings))]
        for i, layer in enumerate([*flat, *up]):
            x = nn.relu(layer(self.family.channels, self.options, name=f"block{i}")(x))
        return nn.sigmoid(block(3, self.options, name="last")(x))


class _Custom(nn.Module):
    """The family custom, which has no norms and halves the channels with every doubling but the last."""

    doublings: int
    options: _Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(self.doublings - 1):
            features = x.shape[-1] // 2
            x = nn.relu(_Conv(features, self.options)(x))
            x = nn.relu(_Upsampling(features, self.options)(x))
        x = nn.relu(_Conv(x.shape[-1], self.options)(x))
        last = _Upsampling if self.doublings else _Conv
        return nn.sigmoid(last(3, self.options)(x))
