"""The record of a network: everything that the rest of the package knows about it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import flax.linen as nn


class Layer(NamedTuple):
    """A layer of a network; a network can be cut after any layer."""

    module: Callable[..., nn.Module]  # called with `options` and `name`
    channels: int  # of the output
    # Its modules in the `nn.Sequential` of the official code, in order: the name of a submodule, "" for the
    # layer as a whole, None for a module without parameters.
    official: tuple[str | None, ...] = ("",)


class Layers(Protocol):
    """Makes the layers of a network, from the images to the last feature map."""

    def __call__(self, *, width: int, image_size: int, stem_stride: int) -> list[Layer]: ...


class Network(NamedTuple):
    """A network by name. `models.named.NETWORKS` lists all of them."""

    name: str
    paper_width: int  # channels of the first convolution in the paper
    width_step: int  # a width is a multiple of it
    layers: Layers
    layers_in_words: str  # for messages about the cut: "stem and 8 blocks"
    has_stem: bool = True  # whether its first layer has a stride
    smallest_image: int = 1  # pixels a side of which the layers leave one
    # Whether the features are the means of the last map, by global average pooling, or all of its values.
    pooled: bool = True
    head_expansion: int = 1  # width of the hidden layer of the head "mlp", divided by `key_dim`
    # Names of submodules that the official code calls otherwise. It calls each norm "bn".
    official_names: Mapping[str, str] = {}
    # Whether the official code appends the layers of the head to its `nn.Sequential` one by one.
    official_flat_head: bool = False
