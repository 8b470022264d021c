"""ResNet for small images as a list of layers that can be cut anywhere.

He et al. 2016, with the norm, strides and cut positions of the official MocoSFL code.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
from jax import Array

from mocosfl_jax.models.layers import Convolution, GroupNorm, WSConv

# Blocks in each of the four stages, and whether they are bottleneck blocks.
DEPTHS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
BOTTLENECK_EXPANSION = 4


class Stem(nn.Module):
    """First convolution, norm and ReLU; no max-pool."""

    features: int
    kernel_size: int
    stride: int
    conv: Convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = WSConv(self.features, self.kernel_size, self.stride, self.conv, name="conv1")(x)
        return nn.relu(GroupNorm(name="norm1")(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    features: int
    stride: int
    conv: Convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = WSConv(self.features, 3, self.stride, self.conv, name="conv1")(x)
        y = nn.relu(GroupNorm(name="norm1")(y))
        y = WSConv(self.features, 3, 1, self.conv, name="conv2")(y)
        y = GroupNorm(name="norm2")(y)
        return nn.relu(y + _shortcut(x, self.features, self.stride, self.conv))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut; four times as many channels leave as lie within."""

    features: int
    stride: int
    conv: Convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = WSConv(self.features, 1, 1, self.conv, name="conv1")(x)
        y = nn.relu(GroupNorm(name="norm1")(y))
        y = WSConv(self.features, 3, self.stride, self.conv, name="conv2")(y)
        y = nn.relu(GroupNorm(name="norm2")(y))
        y = WSConv(BOTTLENECK_EXPANSION * self.features, 1, 1, self.conv, name="conv3")(y)
        y = GroupNorm(name="norm3")(y)
        return nn.relu(y + _shortcut(x, BOTTLENECK_EXPANSION * self.features, self.stride, self.conv))


def _shortcut(x: Array, features: int, stride: int, conv: Convolution) -> Array:
    """The identity, or a 1x1 convolution and norm where the shape changes."""
    if stride == 1 and x.shape[-1] == features:
        return x
    x = WSConv(features, 1, stride, conv, name="shortcut_conv")(x)
    return GroupNorm(name="shortcut_norm")(x)


def resnet_layers(
    name: str, *, width: int, stem_kernel: int, stem_stride: int
) -> list[Callable[..., nn.Module]]:
    """The layers between images and global average pool, in order: stem, block 1, block 2, ...

    Args:
      name: a key of `DEPTHS`.
      width: channels of the stem; 64 in the paper.
      stem_kernel: 3, or 7 for images of 224 px.
      stem_stride: stride of the stem.

    Returns:
      One constructor a layer, that waits for `conv`, the way convolutions are computed.
    """
    stages, is_bottleneck = DEPTHS[name]
    block = BottleneckBlock if is_bottleneck else BasicBlock
    layers: list[Callable[..., nn.Module]] = [
        functools.partial(Stem, width, stem_kernel, stem_stride, name="layer0")
    ]
    for stage, blocks in enumerate(stages):
        for i in range(blocks):
            stride = 2 if stage > 0 and i == 0 else 1
            layers.append(functools.partial(block, width * 2**stage, stride, name=f"layer{len(layers)}"))
    return layers
