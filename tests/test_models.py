"""Networks that are cut: sizes, cuts, and what becomes of client convolutions."""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import Features, split_model
from mocosfl_jax.errors import UserError


def parameters(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name, cut_layer, client, server",
    [
        # From the official code: tests/golden, and the paper's table 1 for the client of cut 2.
        ("resnet18", 1, 1_856, 12_741_888),
        ("resnet18", 2, 75_840, None),
        ("resnet50", 2, 76_864, 36_011_520),
    ],
)
def test_parameters_on_each_side_of_the_cut(
    name: str, cut_layer: int, client: int, server: int | None
) -> None:
    sides = jax.eval_shape(split_model(name, cut_layer=cut_layer).init, jax.random.key(0))
    assert parameters(sides[0]) == client
    assert server is None or parameters(sides[1]) == server


def test_two_cuts_of_a_network_compute_the_same() -> None:
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    def run(cut_layer: int) -> Features:
        model = split_model("resnet18", cut_layer=cut_layer, width=4, image_size=8, key_dim=8)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        # One value a parameter whichever side it is on: layers have names of their own.
        named = jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                np.random.default_rng(zlib.crc32(str(path[1:]).encode()))
                .normal(size=leaf.shape)
                .astype(np.float32)
            ),
            shapes,
        )
        return jax.jit(lambda client, server: model.server(server, model.client(client, images)))(*named)

    for one, other in zip(run(1), run(7), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("image_size, side", [(32, 32), (64, 32), (224, 112)])
def test_stem_follows_the_image_size(image_size: int, side: int) -> None:
    model = split_model("resnet34", cut_layer=1, image_size=image_size)
    params = jax.eval_shape(model.init, jax.random.key(0))[0]
    smashed = jax.eval_shape(model.client, params, jnp.zeros((3, image_size, image_size, 3)))
    assert smashed.shape == (3, side, side, 64)
    assert params["layer0"]["conv1"]["kernel"].shape[:2] == ((7, 7) if image_size == 224 else (3, 3))


def test_stacked_clients_run_no_grouped_convolution() -> None:
    model = split_model("resnet18", cut_layer=2, width=4, image_size=8)
    shapes = jax.eval_shape(model.init, jax.random.key(0))[0]
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((5, *leaf.shape), leaf.dtype), shapes)
    images = jnp.zeros((5, 2, 8, 8, 3))

    def loss(params: object) -> jax.Array:
        return jnp.sum(jnp.square(jax.vmap(model.client)(params, images)))

    compiled = jax.jit(jax.grad(loss)).lower(stacked).compile().as_text()
    assert compiled is not None
    assert "dot" in compiled or "ynn" in compiled
    assert not re.findall(r"(?:feature|batch)_group_count=\d+", compiled)
    assert " convolution(" not in compiled


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cut_layer": 9}, r"config.model.cut_layer: found 9, allowed: 1 to 8 for resnet18"),
        ({"cut_layer": 0}, r"config.model.cut_layer: found 0"),
        ({"name": "resnet19"}, r"config.model.name: found 'resnet19', allowed: resnet18, resnet34, resnet50"),
        ({"width": 6}, r"config.model.width: found 6, allowed: multiples of 4"),
    ],
)
def test_impossible_networks_are_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_model(**({"name": "resnet18", "cut_layer": 1} | change))
