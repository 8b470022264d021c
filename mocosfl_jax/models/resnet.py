"""ResNet for small images, as a list of layers between which it can be cut.

He et al. 2016, with the norm, strides and cut positions of the official MocoSFL code.
"""

import functools

import flax.linen as nn
from jax import Array

from mocosfl_jax.models.layers import Conv, Norm, Options, shortcut
from mocosfl_jax.models.network import Layer, Network

BOTTLENECK_EXPANSION = 4


class Stem(nn.Module):
    """First convolution, norm and ReLU; no max-pool. Always weight-standardised, as in the official code."""

    features: int
    kernel_size: int
    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        options = self.options.standardised()
        x = Conv(self.features, self.kernel_size, self.stride, options, name="conv1")(x)
        return nn.relu(Norm(self.options, name="norm1")(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    features: int
    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Conv(self.features, 3, self.stride, self.options, name="conv1")(x)
        y = nn.relu(Norm(self.options, name="norm1")(y))
        y = Conv(self.features, 3, 1, self.options, name="conv2")(y)
        y = Norm(self.options, name="norm2")(y)
        if self.options.residual:
            y = y + shortcut(x, y.shape[-1], self.stride, self.options)
        return nn.relu(y)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the output has four times the inner channels.

    The convolution of the shortcut is always weight-standardised, as in the official code.
    """

    features: int
    stride: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = Conv(self.features, 1, 1, self.options, name="conv1")(x)
        y = nn.relu(Norm(self.options, name="norm1")(y))
        y = Conv(self.features, 3, self.stride, self.options, name="conv2")(y)
        y = nn.relu(Norm(self.options, name="norm2")(y))
        y = Conv(BOTTLENECK_EXPANSION * self.features, 1, 1, self.options, name="conv3")(y)
        y = Norm(self.options, name="norm3")(y)
        if self.options.residual:
            y = y + shortcut(x, y.shape[-1], self.stride, self.options.standardised())
        return nn.relu(y)


def resnet(name: str, stages: tuple[int, ...], *, bottlenecks: bool) -> Network:
    """A ResNet with so many blocks in each of its stages, which may be bottleneck blocks."""
    return Network(
        name,
        paper_width=64,
        width_step=4,
        layers=functools.partial(resnet_layers, stages, bottlenecks),
        layers_in_words=f"stem and {sum(stages)} blocks",
        head_expansion=BOTTLENECK_EXPANSION if bottlenecks else 1,
        official_names={"shortcut_conv": "shortcut.0", "shortcut_norm": "shortcut.1"},
    )


def resnet_layers(
    stages: tuple[int, ...], bottlenecks: bool, *, width: int, image_size: int, stem_stride: int
) -> list[Layer]:
    """The layers between the images and the global average pool: stem, block 1, block 2, ...

    Args:
      stages: Blocks of each stage.
      bottlenecks: Whether they are bottleneck blocks.
      width: Channels of the stem.
      image_size: Pixels a side; from 224 on the stem is 7x7, else 3x3.
      stem_stride: Stride of the stem.
    """
    block = BottleneckBlock if bottlenecks else BasicBlock
    expansion = BOTTLENECK_EXPANSION if bottlenecks else 1
    kernel_size = 7 if image_size >= 224 else 3
    layers = [Layer(functools.partial(Stem, width, kernel_size, stem_stride), width)]
    for stage, blocks in enumerate(stages):
        features = width * 2**stage
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            layers.append(Layer(functools.partial(block, features, stride), expansion * features))
    return layers


NETWORKS = (
    resnet("resnet18", (2, 2, 2, 2), bottlenecks=False),
    resnet("resnet34", (3, 4, 6, 3), bottlenecks=False),
    resnet("resnet50", (3, 4, 6, 3), bottlenecks=True),
    resnet("resnet101", (3, 4, 23, 3), bottlenecks=True),
    resnet("resnet152", (3, 8, 36, 3), bottlenecks=True),
)
