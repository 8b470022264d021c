"""MobileNetV2 for small images, as a list of layers between which it can be cut.

Sandler et al. 2018, with the norm, strides, shortcuts and cut positions of the official MocoSFL code.
Shortcuts have the same norm as the other layers; in the official code they have batch norm.
"""

import functools

import flax.linen as nn
from jax import Array

from mocosfl_jax.models.layers import Conv, DepthwiseConv, Layer, Norm, Options

NAME = "mobilenetv2"
WIDTH = 32
# For each group of blocks: expansion, channels, number of blocks, stride of the first block.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST_CHANNELS = 1280


class LinearConv(nn.Module):
    """Convolution and norm without activation, for the stem and the last layer."""

    features: int
    kernel_size: int
    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, self.kernel_size, self.stride, self.options, name="conv")(x)
        return Norm(self.options, name="norm")(x)


class Block(nn.Module):
    """Inverted residual: 1x1, depthwise 3x3 and 1x1 convolutions, with a shortcut if the stride is 1."""

    expansion: int
    features: int
    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Conv(self.expansion * x.shape[-1], 1, 1, self.options, name="conv1")(x)
        y = nn.relu(Norm(self.options, name="norm1")(y))
        y = DepthwiseConv(self.stride, self.options, name="conv2")(y)
        y = nn.relu(Norm(self.options, name="norm2")(y))
        y = Conv(self.features, 1, 1, self.options, name="conv3")(y)
        y = Norm(self.options, name="norm3")(y)
        if not self.options.residual or self.stride > 1:
            return y
        return y + _shortcut(x, self.features, self.options)


def _shortcut(x: Array, features: int, options: Options) -> Array:
    """The identity, or a plain 1x1 convolution and norm if the width changes."""
    if x.shape[-1] == features:
        return x
    x = Conv(features, 1, 1, options.standardised(False), name="shortcut_conv")(x)
    return Norm(options, name="shortcut_norm")(x)


class Group(nn.Module):
    """Blocks of one width. The first one may have a stride."""

    expansion: int
    features: int
    blocks: int
    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            x = Block(self.expansion, self.features, stride, self.options, name=f"block{i}")(x)
        return x


def mobilenetv2_layers(*, width: int, stem_stride: int) -> list[Layer]:
    """The layers between images and global average pool: stem, seven groups of blocks, last convolution.

    Args:
      width: Channels of the stem; `WIDTH` in the paper. All other channels scale with it, including the last
        ones.
      stem_stride: Stride of the stem.
    """

    def scaled(channels: int) -> int:
        return channels * width // WIDTH

    layers = [Layer(functools.partial(LinearConv, width, 3, stem_stride, name="layer0"), width)]
    for expansion, channels, blocks, stride in GROUPS:
        features, name = scaled(channels), f"layer{len(layers)}"
        module = functools.partial(Group, expansion, features, blocks, stride, name=name)
        layers.append(Layer(module, features))
    last = functools.partial(LinearConv, scaled(LAST_CHANNELS), 1, 1, name=f"layer{len(layers)}")
    return [*layers, Layer(last, scaled(LAST_CHANNELS))]
