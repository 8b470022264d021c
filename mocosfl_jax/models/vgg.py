"""VGG for small images, as a list of layers between which it can be cut.

Simonyan and Zisserman 2015, with a norm after every convolution. As in the official MocoSFL code, a global
average pool and a projection head replace the three fully connected layers. VGG-9 is the small network of
Wang et al. 2020 (Federated learning with matched averaging), whose fully connected layers see the whole map,
and so does its head here. The official MocoSFL code does not have it.
"""

import functools

import flax.linen as nn
from jax import Array

from mocosfl_jax.models.layers import Conv, Norm, Options, max_pool
from mocosfl_jax.models.network import Layer, Network

# Channels of each 3x3 convolution in the papers, and "M" for a max-pool.
ENTRIES: dict[str, tuple[int | str, ...]] = {
    "vgg9": (32, 64, "M", *2 * (128,), "M", *2 * (256,), "M"),
    "vgg11": (64, "M", 128, "M", *2 * (256,), "M", *2 * (512,), "M", *2 * (512,), "M"),
    "vgg13": (*2 * (64,), "M", *2 * (128,), "M", *2 * (256,), "M", *2 * (512,), "M", *2 * (512,), "M"),
    "vgg16": (*2 * (64,), "M", *2 * (128,), "M", *3 * (256,), "M", *3 * (512,), "M", *3 * (512,), "M"),
    "vgg19": (*2 * (64,), "M", *2 * (128,), "M", *4 * (256,), "M", *4 * (512,), "M", *4 * (512,), "M"),
}
NOT_POOLED = ("vgg9",)


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


def vgg_layers(
    entries: tuple[int | str, ...], *, width: int, image_size: int, stem_stride: int
) -> list[Layer]:
    """The layers between the images and the last feature map: convolutions and max-pools.

    Args:
      entries: One of `ENTRIES`.
      width: Channels of the first convolution.
      image_size: Not used: the layers are the same for all images.
      stem_stride: Not used: there is no stem.
    """
    layers: list[Layer] = []
    channels = 3
    for entry in entries:
        if isinstance(entry, int):
            channels = entry * width // paper_width(entries)
            relu = None
            layers.append(Layer(functools.partial(ConvBlock, channels), channels, ("conv", "norm", relu)))
        else:
            layers.append(Layer(MaxPool, channels, (None,)))
    return layers


def paper_width(entries: tuple[int | str, ...]) -> int:
    """Channels of the first convolution in the paper."""
    return int(entries[0])


NETWORKS = tuple(
    Network(
        name,
        paper_width=paper_width(entries),
        width_step=4,
        layers=functools.partial(vgg_layers, entries),
        layers_in_words=f"{len(entries)} convolutions and max-pools",
        has_stem=False,
        smallest_image=2 ** entries.count("M"),
        pooled=name not in NOT_POOLED,
        official_flat_head=True,
    )
    for name, entries in ENTRIES.items()
)
