"""MobileNetV2 for small images, as a list of layers between which it can be cut.

Sandler et al. 2018, with the norm, strides, shortcuts and cut positions of the official MocoSFL code.
Shortcuts have the same norm as the other layers; in the official code they have batch norm.
"""

import functools

import flax.linen as nn
from jax import Array

from mocosfl_jax.models.layers import Conv, DepthwiseConv, Norm, Options, shortcut
from mocosfl_jax.models.network import Layer, Network

WIDTH = 32  # of the stem in the paper
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
        return y + shortcut(x, self.features, 1, self.options.standardised(False))  # a plain convolution


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


def mobilenetv2_layers(*, width: int, image_size: int, stem_stride: int) -> list[Layer]:
    """The layers between images and global average pool: stem, seven groups of blocks, last convolution.

    Args:
      width: Channels of the stem. All other channels scale with it, including the last ones.
      image_size: Not used: the layers are the same for all images.
      stem_stride: Stride of the stem.
    """

    def scaled(channels: int) -> int:
        return channels * width // WIDTH

    def linear(channels: int, kernel_size: int, stride: int) -> Layer:
        module = functools.partial(LinearConv, channels, kernel_size, stride)
        return Layer(module, channels, ("conv", "norm"))

    layers = [linear(width, 3, stem_stride)]
    for expansion, channels, blocks, stride in GROUPS:
        features = scaled(channels)
        module = functools.partial(Group, expansion, features, blocks, stride)
        layers.append(Layer(module, features, tuple(f"block{i}" for i in range(blocks))))
    return [*layers, linear(scaled(LAST_CHANNELS), 1, 1)]


NETWORK = Network(
    "mobilenetv2",
    paper_width=WIDTH,
    width_step=16,
    layers=mobilenetv2_layers,
    layers_in_words=f"stem, {len(GROUPS)} groups of blocks and last convolution",
    official_names={"shortcut_conv": "shortcut.0", "shortcut_norm": "shortcut.1"},
)
