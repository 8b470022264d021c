"""A network cut in two: the client's first layers and the server's rest."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from mocosfl_jax.errors import UserError
from mocosfl_jax.models import resnet
from mocosfl_jax.models.layers import Convolution, ProjectionHead, direct_conv, patches_conv

Params = Any  # a tree of arrays


class Features(NamedTuple):
    """What the whole network says of n images."""

    backbone: Array  # [n, D], globally average-pooled
    projection: Array  # [n, key_dim], output of the head, not normalised


class SplitModel(NamedTuple):
    """Pure functions of one client-side and one server-side model.

    Any network fits: `mocosfl` uses nothing but these four.
    """

    init: Callable[[Array], tuple[Params, Params]]  # rng -> client params, server params
    client: Callable[[Params, Array], Array]  # params, images [n, H, W, 3] -> smashed data [n, h, w, c]
    server: Callable[[Params, Array], Features]  # params, smashed data [n, h, w, c] -> Features
    key_dim: int  # width of the projection


class _Sequence(nn.Module):
    """Layers one after the other, computed with one kind of convolution."""

    layers: Sequence[Callable[..., nn.Module]]
    conv: Convolution

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(conv=self.conv)(x)
        return x


class _Server(nn.Module):
    """The layers after the cut, global average pool and projection head."""

    layers: Sequence[Callable[..., nn.Module]]
    head: ProjectionHead

    @nn.compact
    def __call__(self, smashed: Array) -> Features:
        x = smashed
        for layer in self.layers:
            x = layer(conv=direct_conv)(x)
        backbone = jnp.mean(x, axis=(1, 2))
        return Features(backbone, self.head(backbone))


def check_model(name: str, *, cut_layer: int, width: int) -> None:
    """Raise UserError, which says what is allowed, if there is no such network or no such cut."""
    if name not in resnet.DEPTHS:
        raise UserError(f"config.model.name: found {name!r}, allowed: {', '.join(resnet.DEPTHS)}")
    if width < 4 or width % 4:
        raise UserError(f"config.model.width: found {width}, allowed: multiples of 4")
    last = sum(resnet.DEPTHS[name][0])
    if not 1 <= cut_layer <= last:
        raise UserError(
            f"config.model.cut_layer: found {cut_layer}, allowed: 1 to {last} for {name} "
            f"(a stem and {last} blocks, of which the server keeps at least one)"
        )


def split_model(
    name: str,
    *,
    cut_layer: int,
    width: int = 64,
    image_size: int = 32,
    stem_stride: int | None = None,
    key_dim: int = 1024,
    mlp: bool = True,
) -> SplitModel:
    """ResNet-18, -34 or -50 cut after its first `cut_layer` layers.

    Args:
      name: "resnet18", "resnet34" or "resnet50".
      cut_layer: how many of [stem, block 1, block 2, ...] are the client's, at least 1; at least one
        block stays with the server.
      width: channels of the stem, a multiple of 4 (a group of the norm has four channels).
      image_size: pixels a side.
      stem_stride: None takes the paper's, 1 below 64 px and 2 from there on.
      key_dim: width of query and key embeddings.
      mlp: head with one hidden layer of key_dim x expansion (MoCo V2), or one linear layer (V1).

    Raises:
      UserError: if a value is not possible; the message says what is.
    """
    check_model(name, cut_layer=cut_layer, width=width)
    stem_kernel = 7 if image_size >= 224 else 3
    default_stride = 2 if image_size >= 64 else 1
    stack = resnet.resnet_layers(
        name, width=width, stem_kernel=stem_kernel, stem_stride=stem_stride or default_stride
    )
    expansion = resnet.BOTTLENECK_EXPANSION if resnet.DEPTHS[name][1] else 1
    head = ProjectionHead(key_dim, key_dim * expansion if mlp else None, name="head")
    client = _Sequence(tuple(stack[:cut_layer]), patches_conv)
    server = _Server(tuple(stack[cut_layer:]), head)

    def init(rng: Array) -> tuple[Params, Params]:
        rng_client, rng_server = jax.random.split(rng)
        images = jnp.zeros((1, image_size, image_size, 3))
        smashed, client_params = client.init_with_output(rng_client, images)
        return client_params["params"], server.init(rng_server, smashed)["params"]

    def apply_client(params: Params, images: Array) -> Array:
        smashed: Any = client.apply({"params": params}, images)
        return smashed

    def apply_server(params: Params, smashed: Array) -> Features:
        features: Any = server.apply({"params": params}, smashed)
        return features

    return SplitModel(init, apply_client, apply_server, key_dim)
