"""Networks of a user: what they see, what is refused at the door, and whether images are independent."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from mocosfl_jax import (
    MomentumContrast,
    SplitModel,
    Views,
    check_independence,
    flmoco,
    mocosfl,
    split_model,
)
from mocosfl_jax.errors import UserError

IMAGE = (8, 8, 3)


class ConvNet(nn.Module):
    """A backbone as anybody writes it. Given [views, n, h, w, c] it would average over n and h."""

    norm: Callable[[Array], Array] = nn.GroupNorm(2)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.norm(nn.Conv(6, (3, 3), strides=2)(x))
        return jnp.mean(nn.relu(x), axis=(1, 2))


CLIENT = nn.Sequential([nn.Conv(4, (3, 3)), nn.tanh])
HEAD = nn.Sequential([nn.Dense(7), nn.relu, nn.Dense(5)])


def linen(**changes: Any) -> SplitModel:
    return SplitModel.from_linen(
        **({"client": CLIENT, "backbone": ConvNet(), "head": HEAD} | changes), image_shape=IMAGE
    )


def views(seed: int, clients: int, batch: int) -> Views:
    query, key = jax.random.normal(jax.random.key(seed), (2, clients, batch, *IMAGE))
    return Views(query, key)


@pytest.mark.parametrize("whole", [False, True])
def test_an_own_network_trains_image_by_image(whole: bool, x64: None) -> None:
    """Its step is that of the same network applied to one image at a time."""
    model = linen()

    def alone(function: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
        def run(params: Any, x: Array) -> Array:
            return jax.lax.map(lambda image: function(params, image[None])[0], x)

        return run

    def trained(model: SplitModel) -> Any:
        make = flmoco if whole else mocosfl
        algorithm = make(model, num_clients=2, moco=MomentumContrast(queue_size=16))
        state = jax.jit(lambda rng: algorithm.enter(algorithm.init(rng)))(jax.random.key(0))
        state, info = jax.jit(algorithm.step)(state, views(0, 2, 2))
        return state.clients.params, state.server, info.loss

    one_by_one = model._replace(client=alone(model.client), backbone=alone(model.backbone))
    found, expected = jax.tree.leaves(trained(model)), jax.tree.leaves(trained(one_by_one))
    assert len(found) == len(expected) > 10
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    check_independence(model, IMAGE)


def test_what_the_functions_of_a_network_see() -> None:
    """One batch each: clients their own images, the backbone all views, the head one view."""
    seen: dict[str, set[tuple[int, ...]]] = {"client": set(), "backbone": set(), "head": set()}
    model = linen()

    def watched(name: str) -> Any:
        def run(params: Any, x: Array) -> Array:
            seen[name].add(x.shape)
            return getattr(model, name)(params, x)

        return run

    model_seen = model._replace(**{name: watched(name) for name in seen})
    algorithm = mocosfl(model_seen, num_clients=2, moco=MomentumContrast(queue_size=12, symmetric=True))
    state = jax.eval_shape(lambda rng: algorithm.enter(algorithm.init(rng)), jax.random.key(0))
    jax.eval_shape(algorithm.step, state, views(0, 2, 3))
    assert seen == {"client": {(3, *IMAGE)}, "backbone": {(2 * 6, 8, 8, 4)}, "head": {(6, 6)}}


def test_linen_modules_have_their_own_initialisation() -> None:
    model = linen()
    assert model.key_dim == 5
    client, server = model.init(jax.random.key(3))
    assert set(server) == {"backbone", "head"}
    rngs = jax.random.split(jax.random.key(3), 3)
    for module, rng, params, x in (
        (CLIENT, rngs[0], client, jnp.zeros((1, *IMAGE))),
        (ConvNet(), rngs[1], server["backbone"], jnp.zeros((1, 8, 8, 4))),
        (HEAD, rngs[2], server["head"], jnp.zeros((1, 6))),
    ):
        jax.tree.map(np.testing.assert_array_equal, params, module.init(rng, x)["params"])
    images = jax.random.normal(jax.random.key(1), (2, *IMAGE))
    smashed: Any = CLIENT.apply({"params": client}, images)
    features: Any = ConvNet().apply({"params": server["backbone"]}, smashed)
    found = model.server(server, model.client(client, images))
    np.testing.assert_array_equal(found.backbone, features)
    np.testing.assert_array_equal(found.projection, HEAD.apply({"params": server["head"]}, features))


def test_a_client_may_have_no_parameters() -> None:
    model = linen(client=nn.Sequential([nn.tanh]))
    client, _ = model.init(jax.random.key(0))
    assert jax.tree.leaves(client) == []
    algorithm = mocosfl(model, num_clients=2, moco=MomentumContrast(queue_size=8))
    state = jax.jit(lambda rng: algorithm.enter(algorithm.init(rng)))(jax.random.key(0))
    state, info = jax.jit(algorithm.step)(state, views(0, 2, 2))
    assert np.isfinite(float(info.loss))


class Integers(nn.Module):
    def __call__(self, x: Array) -> Array:
        return x.astype(jnp.int32)


BATCH_NORM = nn.BatchNorm(use_running_average=False)
FLAT = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(4)])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"client": FLAT},
            r"^client: found an output of shape \(5, 4\) for n = 5 images, allowed: smashed dat",
        ),
        ({"client": Integers()}, "^client: found an output of int32, allowed: floats"),
        (
            {"backbone": nn.Conv(6, (3, 3))},
            r"^backbone: found an output of shape \(5, 8, 8, 6\) for n = 5 imag",
        ),
        (
            {"backbone": nn.Sequential([ConvNet(), lambda x: x[:1]])},
            r"^backbone: .* shape \(1, 6\) for n = 5",
        ),
        (
            {"head": nn.Sequential([nn.Dense(4), lambda x: x.sum(-1)])},
            r"^head: found an output of shape \(5,\)",
        ),
        ({"head": nn.Sequential([lambda x: (x, x)])}, "^head: found a tuple, allowed: projections"),
        (
            {"client": nn.Sequential([nn.Conv(4, (3, 3)), BATCH_NORM])},
            "^client: found variables in 'batch_st",
        ),
        (
            {"head": nn.Sequential([nn.Dense(4), BATCH_NORM])},
            "^head: found variables in 'batch_stats', allowed:",
        ),
        (
            {"head": nn.Dropout(0.5, deterministic=False)},
            "^head: found a layer that draws random numbers, allow",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        linen(**change)


def functions(**changes: Any) -> SplitModel:
    """Two matrices."""
    plain: dict[str, Any] = {
        "init": lambda rng: (jnp.ones((3, 4)), {"body": jnp.ones((4, 6)), "head": jnp.ones((6, 2))}),
        "client": lambda params, images: images @ params,
        "backbone": lambda params, smashed: smashed.mean(axis=(1, 2)) @ params["body"],
        "head": lambda params, features: features @ params["head"],
        "image_shape": IMAGE,
    }
    return SplitModel.from_functions(**plain | changes)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"init": lambda rng: jnp.ones((3, 4))}, "^init: found a .* of 1 arrays, allowed: a pair"),
        ({"init": lambda rng: (jnp.ones(3, int), {})}, r"^init: found int32 in params\[0\], allowed: floats"),
        (
            {"init": lambda rng: ({"rng": rng}, {})},
            r"^init: found key<fry> in params\[0\]\['rng'\], allowed: fl",
        ),
        (
            {"backbone": lambda params, x: x.mean((0, 1)) @ params["body"]},
            r"^backbone: .*shape \(8, 6\) for n",
        ),
        ({"image_shape": (8, 8)}, r"^image_shape: found \(8, 8\), allowed: \(height, width, channels\)"),
    ],
)
def test_functions_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    assert functions().key_dim == 2
    with pytest.raises(UserError, match=message):
        functions(**change)


def test_an_error_of_a_users_function_names_it() -> None:
    with pytest.raises(TypeError) as error:
        functions(backbone=lambda params, smashed: smashed @ params["head"])
    assert any("raised by `backbone`" in note and "(5, 8, 8, 4)" in note for note in error.value.__notes__)


def test_nnx_modules_as_functions() -> None:
    """The recipe of docs/reference/models.md."""

    class Client(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)

        def __call__(self, images: Array) -> Array:
            return nnx.tanh(self.conv(images))

    class Server(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv, self.head = nnx.Conv(4, 6, (3, 3), rngs=rngs), nnx.Linear(6, 5, rngs=rngs)

        def backbone(self, smashed: Array) -> Array:
            return nnx.relu(self.conv(smashed)).mean(axis=(1, 2))

    def modules(rng: Array) -> tuple[Client, Server]:
        rngs = nnx.Rngs(rng)
        return Client(rngs), Server(rngs)

    def init(rng: Array) -> tuple[Any, Any]:
        client, server = modules(rng)
        return nnx.to_pure_dict(nnx.state(client)), nnx.to_pure_dict(nnx.state(server))

    client_graph, server_graph = map(nnx.graphdef, nnx.eval_shape(modules, jax.random.key(0)))
    model = SplitModel.from_functions(
        init,
        client=lambda params, images: nnx.merge(client_graph, params)(images),
        backbone=lambda params, smashed: nnx.merge(server_graph, params).backbone(smashed),
        head=lambda params, features: nnx.merge(server_graph, params).head(features),
        image_shape=IMAGE,
    )
    check_independence(model, IMAGE)
    client, server = modules(jax.random.key(4))
    images = jax.random.normal(jax.random.key(1), (2, *IMAGE))
    params = model.init(jax.random.key(4))
    np.testing.assert_allclose(
        model.whole_backbone(params, images), server.backbone(client(images)), rtol=1e-5, atol=1e-6
    )
    algorithm = mocosfl(model, num_clients=2, moco=MomentumContrast(queue_size=8))
    state = jax.jit(lambda rng: algorithm.enter(algorithm.init(rng)))(jax.random.key(0))
    new, _ = jax.jit(algorithm.step)(state, views(0, 2, 2))
    moved = [
        np.any(a != b)
        for a, b in zip(*map(jax.tree.leaves, (state.clients.params, new.clients.params)), strict=True)
    ]
    assert len(moved) == 2 and all(moved)


def batch_norm(x: Array) -> Array:
    mean, variance = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 1e-5)


@pytest.mark.parametrize(
    "side, change",
    [
        ("client", {"client": nn.Sequential([nn.Conv(4, (3, 3)), batch_norm])}),
        ("backbone", {"backbone": ConvNet(batch_norm)}),
        # What the mean over axes 1 and 2 did with [views, n, h, w, c]: the images of a batch are averaged.
        ("backbone", {"backbone": nn.Sequential([ConvNet(), lambda x: x + x.mean(0, keepdims=True)])}),
        # Half of each image's channels come from its neighbour.
        (
            "client",
            {"client": nn.Sequential([CLIENT, lambda x: x.at[..., 2:].set(jnp.roll(x, 1, 0)[..., 2:])])},
        ),
        # Layers that start at zero hide nothing.
        (
            "backbone",
            {"backbone": ConvNet(lambda x: nn.LayerNorm(scale_init=nn.initializers.zeros)(batch_norm(x)))},
        ),
        ("backbone", {"backbone": nn.Sequential([ConvNet(), lambda x: x / 0])}),
    ],
)
def test_networks_that_mix_images_are_found(side: str, change: Any) -> None:
    model = linen(**change)
    with pytest.raises(
        UserError, match=rf"^{side}: found outputs of an image that change by .*\(group or layer"
    ):
        check_independence(model, IMAGE)


def test_a_head_that_mixes_images_is_found_where_it_must_not() -> None:
    """Where clients are left out, their rows would change those of the others."""
    model = linen()
    mixing = model._replace(head=lambda params, x: model.head(params, x - x.mean(0, keepdims=True)))
    check_independence(model, IMAGE, head=True)
    check_independence(mixing, IMAGE)
    with pytest.raises(UserError, match=r"^head: found outputs of an image that change by"):
        check_independence(mixing, IMAGE, head=True)


def test_a_backbone_that_averages_its_batch_is_found() -> None:
    """As a mean over axes 1 and 2 of [views, n, h, w, c] does. Without `from_linen`, no shape was checked."""
    model = linen()
    averaged = model._replace(backbone=lambda params, x: model.backbone(params, x).mean(0, keepdims=True))
    with pytest.raises(UserError, match=r"^backbone: found an output of shape \(1, 6\) for a batch and \(4"):
        check_independence(averaged, IMAGE)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "resnet18", "cut_layer": 0, "head": "mlp_bn"},
        {"name": "resnet18", "cut_layer": 2, "bottleneck": "C4S2", "compute_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_our_networks_do_not_mix_images(settings: Any) -> None:
    settings = {"width": 4, "key_dim": 8} | settings
    check_independence(split_model(**settings, image_size=8), (8, 8, 3))
