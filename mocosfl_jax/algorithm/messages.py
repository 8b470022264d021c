"""The arrays that enter the clients and those that cross the cut."""

from typing import NamedTuple

from jax import Array


class Views(NamedTuple):
    """Two normalised augmentations of the same images."""

    query: Array  # [..., H, W, 3], float32
    key: Array  # [..., H, W, 3], float32


class SmashedData(NamedTuple):
    """Outputs of the client-side models at the cut, [M, B, h, w, c] each, or concatenated [n, h, w, c].

    Their dtype is that of the model's activations, float32 or bfloat16.
    """

    query: Array  # from the online models
    key: Array  # from the momentum models; the server treats it as a constant
