"""Your own network: two small parts in Flax Linen, one for the clients and one for the server.

    python -m mocosfl_jax.train --config=examples/own_network.py
    python -m mocosfl_jax.evaluate --workdir=runs/own_network --config=examples/own_network.py

Each module sees a batch [n, ...]. The first two must treat its images one by one: group norm is fine, batch
norm is not. Before the training, their shapes are checked, and that an image has the same output alone and in
a batch.
"""

from typing import Any

import flax.linen as nn
from jax import Array

from mocosfl_jax import SplitModel
from mocosfl_jax.config import Config, Own, quickstart


class Client(nn.Module):
    """The part of a client: images [n, H, W, 3] -> smashed data [n, H / 2, W / 2, 16]."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        return nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3), strides=2)(images)))


class Backbone(nn.Module):
    """The part of the server: smashed data [n, h, w, 16] -> features [n, 128]."""

    @nn.compact
    def __call__(self, smashed: Array) -> Array:
        x = smashed
        for features in (32, 64, 128):
            x = nn.relu(nn.GroupNorm(4)(nn.Conv(features, (3, 3), strides=2)(x)))
        return x.mean(axis=(1, 2))


def network(config: Any, image_size: int, forms: Any) -> SplitModel:
    """Both parts, and a head that maps features [n, 128] to queries and keys [n, key_dim].

    `forms` are ways to write convolutions, for networks of the package. This network needs none.
    """
    head = nn.Sequential([nn.Dense(128), nn.relu, nn.Dense(config.moco.key_dim)])
    return SplitModel.from_linen(Client(), Backbone(), head, image_shape=(image_size, image_size, 3))


def get_config() -> Config:
    config = quickstart()
    config.own = Own(network=network)
    return config
