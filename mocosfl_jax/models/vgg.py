"""VGG for small images, as a list of layers between which it can be cut.

Simonyan and Zisserman 2015, with a norm after every convolution. As in the official MocoSFL code, a global
average pool and a projection head replace the three fully connected layers.
"""

import functools

import flax.linen as nn
from jax import Array

from mocosfl_jax.models.layers import Conv, Layer, Norm, Options, max_pool

# Channels of each 3x3 convolution, and "M" for a max-pool.
ENTRIES: dict[str, tuple[int | str, ...]] = {
    "vgg11": (64, "M", 128, "M", *2 * (256,), "M", *2 * (512,), "M", *2 * (512,), "M"),
    "vgg13": (*2 * (64,), "M", *2 * (128,), "M", *2 * (256,), "M", *2 * (512,), "M", *2 * (512,), "M"),
    "vgg16": (*2 * (64,), "M", *2 * (128,), "M", *3 * (256,), "M", *3 * (512,), "M", *3 * (512,), "M"),
    "vgg19": (*2 * (64,), "M", *2 * (128,), "M", *4 * (256,), "M", *4 * (512,), "M", *4 * (512,), "M"),
}
WIDTH = 64
SMALLEST_IMAGE = 32  # five max-pools leave one pixel


class ConvBlock(nn.Module):
    """3x3 convolution with bias, norm and ReLU."""

    features: int
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv(self.features, 3, 1, self.options, bias=True, name="conv")(x)
        return nn.relu(Norm(self.options, name="norm")(x))


class MaxPool(nn.Module):
    """2x2 max-pool."""

    options: Options

    def __call__(self, x: Array) -> Array:
        return max_pool(x)


def vgg_layers(name: str, *, width: int) -> list[Layer]:
    """The layers between the images and the global average pool: convolutions and max-pools.

    Args:
      name: A key of `ENTRIES`.
      width: Channels of the first convolution; `WIDTH` in the paper.
    """
    layers: list[Layer] = []
    channels = 3
    for i, entry in enumerate(ENTRIES[name]):
        if isinstance(entry, int):
            channels = entry * width // WIDTH
            layers.append(Layer(functools.partial(ConvBlock, channels, name=f"layer{i}"), channels))
        else:
            layers.append(Layer(functools.partial(MaxPool, name=f"layer{i}"), channels))
    return layers
