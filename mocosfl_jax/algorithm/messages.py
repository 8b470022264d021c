"""What enters the clients and what they send across the cut."""

from typing import NamedTuple

from jax import Array


class Views(NamedTuple):
    """Two augmentations of the same images, normalised."""

    query: Array  # [..., H, W, 3], float32
    key: Array  # [..., H, W, 3], float32


class SmashedData(NamedTuple):
    """Output of the client-side models at the cut: [M, B, h, w, c] each, concatenated [n, h, w, c]."""

    query: Array  # of the online models
    key: Array  # of the momentum models; a constant to the server
