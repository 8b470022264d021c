"""Split networks: sizes, cuts, and how client convolutions are stacked."""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from mocosfl_jax import Features, split_model
from mocosfl_jax.errors import UserError
from mocosfl_jax.models import mobilenetv2
from mocosfl_jax.models.bottleneck import Bottleneck, read_bottleneck
from mocosfl_jax.models.convolution import direct_conv
from mocosfl_jax.models.layers import Conv, Norm, Options
from mocosfl_jax.models.named import NETWORKS
from mocosfl_jax.models.network import Layer, Network
from mocosfl_jax.models.norms import group_norm
from mocosfl_jax.models.resnet import BasicBlock
from mocosfl_jax.models.vgg import ConvBlock, MaxPool
from mocosfl_jax.weights.official import from_official


def parameters(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "settings, client, server",
    [
        # From the official code (tests/golden), and table 1 of the paper for the client with cut layer 2.
        ({"name": "resnet18", "cut_layer": 1}, 1_856, 12_741_888),
        ({"name": "resnet18", "cut_layer": 2}, 75_840, None),
        ({"name": "resnet18", "cut_layer": 2, "bottleneck": "C4S2"}, 78_148, 12_670_272),
        ({"name": "resnet50", "cut_layer": 2}, 76_864, 36_011_520),
        ({"name": "vgg13", "cut_layer": 2}, 38_976, 10_946_816),
        ({"name": "mobilenetv2", "cut_layer": 2}, 3_456, 4_642_000),
    ],
    ids=str,
)
def test_parameters_on_each_side_of_the_cut(settings: Any, client: int, server: int | None) -> None:
    sides = jax.eval_shape(split_model(**settings).init, jax.random.key(0))
    assert parameters(sides[0]) == client
    assert server is None or parameters(sides[1]) == server


@pytest.mark.parametrize(
    "name, total",
    [
        # torchvision's networks for ImageNet.
        ("resnet34", 21_797_672),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
        # torchvision's vggN_bn with its three fully connected layers replaced by one of 512 x 1000.
        ("vgg11", 132_868_840 - 123_642_856 + 513_000),
        ("vgg16", 138_365_992 - 123_642_856 + 513_000),
        ("vgg19", 143_678_248 - 123_642_856 + 513_000),
        # Kernels and biases of the six convolutions, scales and biases of their norms, and the head, which
        # sees the whole map of 28 x 28 pixels.
        (
            "vgg9",
            9 * (3 * 32 + 32 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 256 * 256)
            + 3 * (32 + 64 + 2 * 128 + 2 * 256)
            + (28 * 28 * 256 + 1) * 1000,
        ),
    ],
)
def test_parameters_of_the_networks_for_imagenet(name: str, total: int) -> None:
    model = split_model(name, cut_layer=1, image_size=224, head="linear", key_dim=1000)
    assert parameters(jax.eval_shape(model.init, jax.random.key(0))) == total


def named_values(shapes: object) -> Any:
    """One value per parameter, independent of its side of the cut: layers have unique names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.random.default_rng(zlib.crc32(str(path[1:]).encode()))
            .normal(size=leaf.shape)
            .astype(np.float32)
        ),
        shapes,
    )


@pytest.mark.parametrize(
    "name, width, image_size, cuts",
    [
        ("resnet18", 4, 8, (1, 7)),
        ("vgg9", 4, 16, (1, 5)),
        ("vgg11", 4, 32, (0, 6)),
        ("mobilenetv2", 16, 8, (2, 7)),
    ],
)
def test_two_cuts_of_a_network_compute_the_same(
    name: str, width: int, image_size: int, cuts: tuple[int, int]
) -> None:
    images = jax.random.normal(jax.random.key(1), (2, image_size, image_size, 3))

    def run(cut_layer: int) -> Features:
        model = split_model(name, cut_layer=cut_layer, width=width, image_size=image_size, key_dim=8)
        sides = named_values(jax.eval_shape(model.init, jax.random.key(0)))
        return jax.jit(lambda client, server: model.server(server, model.client(client, images)))(*sides)

    for one, other in zip(*map(run, cuts), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_the_features_of_vgg9_are_its_last_map() -> None:
    """Against the layers one by one: on the server are the last convolution and the last max-pool."""
    model = split_model("vgg9", cut_layer=7, width=4, image_size=16, key_dim=8)
    _, params = jax.jit(model.init)(jax.random.key(0))
    smashed = jax.random.normal(jax.random.key(1), (3, 4, 4, 32))
    options = Options(direct_conv, group_norm, weight_standardisation=True, norm="group", residual=True)
    block = ConvBlock(32, options).apply({"params": params["layer7"]}, smashed)
    expected = np.asarray(block).reshape(3, 2, 2, 2, 2, 32).max(axis=(2, 4)).reshape(3, -1)
    found = model.server(params, smashed)
    np.testing.assert_allclose(found.backbone, expected, rtol=1e-5, atol=1e-5)
    head = jax.tree.map(np.asarray, params["head"])
    hidden = np.maximum(expected @ head["hidden"]["kernel"] + head["hidden"]["bias"], 0)
    projection = hidden @ head["out"]["kernel"] + head["out"]["bias"]
    np.testing.assert_allclose(found.projection, projection, rtol=1e-4, atol=1e-5)


def test_a_stacked_server_computes_the_same() -> None:
    smashed = jax.random.normal(jax.random.key(1), (3, 4, 4, 4))
    features = []
    for stacked_server in (False, True):
        model = split_model(
            "resnet18", cut_layer=6, width=4, key_dim=8, bottleneck="C4S2", stacked_server=stacked_server
        )
        params = named_values(jax.eval_shape(model.init, jax.random.key(0)))[1]
        features.append(jax.jit(model.server)(params, smashed))
    for direct, patches in zip(*features, strict=True):
        np.testing.assert_allclose(direct, patches, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "settings, image_size, smashed",
    [
        ({"name": "resnet18", "cut_layer": 0}, 32, (32, 32, 3)),
        ({"name": "resnet18", "cut_layer": 8}, 96, (12, 12, 512)),
        ({"name": "resnet34", "cut_layer": 1}, 32, (32, 32, 64)),
        ({"name": "resnet34", "cut_layer": 1}, 64, (32, 32, 64)),
        ({"name": "resnet34", "cut_layer": 1}, 224, (112, 112, 64)),
        ({"name": "resnet50", "cut_layer": 5}, 64, (16, 16, 512)),
        ({"name": "resnet18", "cut_layer": 2, "bottleneck": "C8S1"}, 32, (32, 32, 8)),
        ({"name": "resnet18", "cut_layer": 2, "bottleneck": "C4S4noReLU"}, 32, (8, 8, 4)),
        ({"name": "vgg11", "cut_layer": 7}, 32, (4, 4, 256)),
        ({"name": "vgg13", "cut_layer": 3}, 64, (32, 32, 64)),
        ({"name": "vgg16", "cut_layer": 0}, 96, (96, 96, 3)),
        ({"name": "vgg19", "cut_layer": 20}, 224, (14, 14, 512)),
        ({"name": "mobilenetv2", "cut_layer": 1}, 32, (32, 32, 32)),
        ({"name": "mobilenetv2", "cut_layer": 3}, 64, (32, 32, 24)),
        ({"name": "mobilenetv2", "cut_layer": 4}, 96, (48, 48, 32)),
        ({"name": "mobilenetv2", "cut_layer": 8, "stem_stride": 1}, 224, (28, 28, 320)),
    ],
    ids=str,
)
def test_shapes_follow_cut_and_image_size(
    settings: Any, image_size: int, smashed: tuple[int, int, int]
) -> None:
    model = split_model(**settings, image_size=image_size, key_dim=16)
    client, server = jax.eval_shape(model.init, jax.random.key(0))
    got = jax.eval_shape(model.client, client, jnp.zeros((3, image_size, image_size, 3)))
    assert got.shape == (3, *smashed)
    width = {"resnet50": 2048, "mobilenetv2": 1280}.get(settings["name"], 512)
    features = jax.eval_shape(model.server, server, got)
    assert (features.backbone.shape, features.projection.shape) == ((3, width), (3, 16))


@pytest.mark.parametrize("image_size, kernel_size", [(32, 3), (224, 7)])
def test_stem_kernel_of_a_resnet_follows_the_image_size(image_size: int, kernel_size: int) -> None:
    model = split_model("resnet18", cut_layer=1, image_size=image_size)
    params = jax.eval_shape(model.init, jax.random.key(0))[0]
    assert params["layer0"]["conv1"]["kernel"].shape[:2] == (kernel_size, kernel_size)


@pytest.mark.parametrize(
    "name, head, hidden",
    [
        ("vgg11", "linear", None),
        ("vgg11", "mlp", 16),
        ("resnet50", "mlp", 64),
        ("vgg11", "mlp_bn", 32),
        ("resnet50", "mlp_bn", 32),
    ],
)
def test_heads(name: str, head: str, hidden: int | None) -> None:
    model = split_model(name, cut_layer=1, width=4, key_dim=16, head=head)
    params = jax.eval_shape(model.init, jax.random.key(0))[1]["head"]
    assert set(params) == {"out"} | ({"hidden"} if hidden else set()) | ({"norm"} if "bn" in head else set())
    assert params["out"]["kernel"].shape[-1] == 16
    assert hidden is None or params["hidden"]["kernel"].shape[-1] == hidden


def test_cut_layer_zero_makes_the_client_the_identity() -> None:
    model = split_model("mobilenetv2", cut_layer=0, width=16, image_size=8, key_dim=8)
    client, server = jax.eval_shape(model.init, jax.random.key(0))
    assert client == {}
    assert set(server) == {"head"} | {f"layer{i}" for i in range(9)}
    images = jax.random.normal(jax.random.key(1), (5, 2, 8, 8, 3))
    np.testing.assert_array_equal(jax.vmap(model.client)(client, images), images)


def test_only_the_blocks_of_clients_lose_their_shortcuts() -> None:
    whole = split_model("resnet18", cut_layer=4, width=4)
    cut = split_model("resnet18", cut_layer=4, width=4, client_residual=False)
    sides = [jax.eval_shape(model.init, jax.random.key(0)) for model in (whole, cut)]
    assert set(sides[0][0]["layer3"]) - set(sides[1][0]["layer3"]) == {"shortcut_conv", "shortcut_norm"}
    chex.assert_trees_all_equal_shapes(sides[0][1], sides[1][1])


@pytest.mark.parametrize("residual", [True, False])
def test_what_a_block_adds_to_its_input(residual: bool) -> None:
    options = Options(direct_conv, group_norm, weight_standardisation=True, norm="group", residual=residual)
    x = jax.random.normal(jax.random.key(0), (1, 3, 3, 4))
    blocks = {"norm2": BasicBlock(4, 1, options), "norm3": mobilenetv2.Block(1, 4, 1, options)}
    for last_norm, block in blocks.items():
        params = block.init(jax.random.key(1), x)["params"]
        params[last_norm] = jax.tree.map(jnp.zeros_like, params[last_norm])  # only the shortcut is left
        expected = jnp.zeros_like(x)
        if residual:
            expected = jax.nn.relu(x) if last_norm == "norm2" else x
        np.testing.assert_array_equal(block.apply({"params": params}, x), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "resnet18", "cut_layer": 2},
        {"name": "resnet18", "cut_layer": 4, "client_residual": False},
        {"name": "resnet18", "cut_layer": 1, "bottleneck": "C4S4"},
        {"name": "vgg11", "cut_layer": 3, "image_size": 32},
        {"name": "mobilenetv2", "cut_layer": 4, "width": 16},
    ],
    ids=str,
)
def test_stacked_clients_run_no_convolution(settings: Any) -> None:
    model = split_model(**({"width": 4, "image_size": 8} | settings))
    shapes = jax.eval_shape(model.init, jax.random.key(0))[0]
    images = jnp.zeros((5, 2, *2 * (settings.get("image_size", 8),), 3))

    def loss(params: object) -> jax.Array:
        return jnp.sum(jnp.square(jax.vmap(model.client)(params, images)))

    assert convolutions(jax.grad(loss), stack(shapes)) == 0


def test_stacked_servers_run_no_convolution() -> None:
    model = split_model("resnet18", cut_layer=6, width=4, key_dim=8, bottleneck="C4S2", stacked_server=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0))[1]
    smashed = jnp.zeros((5, 2, 4, 4, 4))

    def loss(params: object) -> jax.Array:
        return jnp.sum(jnp.square(jax.vmap(model.server)(params, smashed).projection))

    assert convolutions(jax.grad(loss), stack(shapes)) == 0


def test_unstacked_convolutions_are_counted() -> None:
    """By the same count: an unstacked convolution has two, for its values and for its kernel's gradient."""

    def loss(kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(direct_conv(jnp.zeros((2, 8, 8, 3)), kernel, stride=1, padding=1)))

    kernel = jnp.zeros((3, 3, 3, 4))
    assert convolutions(jax.grad(loss), kernel) == 2
    stacked = jnp.zeros((5, *kernel.shape))
    assert convolutions(lambda kernels: jax.vmap(jax.grad(loss))(kernels), stacked) == 2


def stack(shapes: object) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((5, *leaf.shape), leaf.dtype), shapes)


def convolutions(function: Callable[..., Any], *shapes: Any) -> int:
    """How many convolutions function(*shapes) runs, including called functions."""

    def count(jaxpr: core.Jaxpr) -> int:
        inner = sum(count(called) for eqn in jaxpr.eqns for called in core.jaxprs_in_params(eqn.params))
        return inner + sum(eqn.primitive.name == "conv_general_dilated" for eqn in jaxpr.eqns)

    return count(jax.make_jaxpr(function)(*shapes).jaxpr)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("C8S1", Bottleneck(channels=8, halvings=0, kernel_size=3, relu=True)),
        ("K1C8S1", Bottleneck(channels=8, halvings=0, kernel_size=1, relu=True)),
        ("C4S2noReLU", Bottleneck(channels=4, halvings=1, kernel_size=3, relu=False)),
        ("noReLUC16S4", Bottleneck(channels=16, halvings=2, kernel_size=3, relu=False)),
    ],
)
def test_bottlenecks_are_parsed(text: str, expected: Bottleneck) -> None:
    assert read_bottleneck(text) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"cut_layer": 9},
            r"^cut_layer: found 9, allowed: 0 to 8 for resnet18 .*stem and 8 blocks",
        ),
        ({"cut_layer": -1}, r"^cut_layer: found -1"),
        ({"name": "vgg11", "cut_layer": 13}, r"found 13, allowed: 0 to 12 .*13 convolutions and max-pools"),
        ({"name": "mobilenetv2", "cut_layer": 9}, r"found 9, allowed: 0 to 8 .*7 groups of blocks"),
        ({"name": "resnet19"}, r"^name: found 'resnet19', allowed: resnet18, .*mobilenetv2"),
        ({"width": 6}, r"^width: found 6, allowed: multiples of 4 for resnet18, .*paper's 64"),
        ({"name": "mobilenetv2", "width": 24}, r"found 24, allowed: multiples of 16 for .*paper's 32"),
        ({"stem_stride": 3}, r"^stem_stride: found 3, allowed: None, 1, 2 or 4"),
        ({"name": "vgg13", "stem_stride": 2}, r"^stem_stride: found 2, allowed: None for vgg13"),
        ({"name": "vgg13", "image_size": 16}, r"^image_size: found 16, allowed: 32 or more"),
        ({"name": "vgg9", "image_size": 7}, r"^image_size: found 7, allowed: 8 or more"),
        ({"key_dim": 0}, "^key_dim: found 0, allowed: 1 or more"),
        ({"norm": "batch"}, r"^norm: found 'batch', allowed: group, layer, instance"),
        ({"compute_dtype": "float16"}, r"^compute_dtype: found 'float16', allowed: float32, bfl"),
        ({"head": "mlp3"}, r"^head: found 'mlp3', allowed: linear, mlp, mlp_bn"),
        ({"bottleneck": "C4S3"}, r"^bottleneck: found 'C4S3', allowed: CxS1, CxS2 or CxS4"),
        ({"bottleneck": "K2C4S1"}, r"^bottleneck: found 'K2C4S1'"),
        ({"bottleneck": "K1C4S2"}, r"^bottleneck: found 'K1C4S2'"),
        ({"bottleneck": "C0S1"}, r"^bottleneck: found 'C0S1'"),
        ({"bottleneck": "C4S2", "cut_layer": 0}, r"found 'C4S2', allowed: None where cut_layer is 0"),
    ],
    ids=str,
)
def test_impossible_networks_are_refused(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_model(**({"name": "resnet18", "cut_layer": 1} | change))


@pytest.mark.parametrize("weight_standardisation", [True, False])
def test_which_convolutions_are_weight_standardised(weight_standardisation: bool) -> None:
    """A constant added to a standardised kernel changes nothing. Even without the option, the official code
    standardises the stem of a ResNet and the shortcuts of bottleneck blocks."""
    model = split_model(
        "resnet50",
        cut_layer=2,
        width=4,
        image_size=8,
        key_dim=8,
        weight_standardisation=weight_standardisation,
    )
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape), shapes)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    client = jax.jit(model.client)
    smashed = client(params, images)
    unchanged = set()
    for layer, conv in (("layer0", "conv1"), ("layer1", "conv1"), ("layer1", "shortcut_conv")):
        kernel = params[layer][conv]["kernel"] + 0.3
        shifted = params | {layer: params[layer] | {conv: {"kernel": kernel}}}
        if np.allclose(client(shifted, images), smashed, atol=1e-3):
            unchanged.add((layer, conv))
    always = {("layer0", "conv1"), ("layer1", "shortcut_conv")}
    assert unchanged == (always | {("layer1", "conv1")} if weight_standardisation else always)


class Body(nn.Module):
    """Convolution and norm."""

    features: int
    options: Options

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Norm(self.options, name="norm")(Conv(self.features, 3, 1, self.options, name="conv")(x))


def test_a_new_network_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record alone gives its layers, its checks and its names in official checkpoints."""

    def layers(*, width: int, image_size: int, stem_stride: int) -> list[Layer]:
        return [
            Layer(partial(Body, width), width, ("conv", "norm")),
            Layer(MaxPool, width, (None,)),
            Layer(partial(Body, 2 * width), 2 * width),
        ]

    record = Network(
        "tiny",
        paper_width=8,
        width_step=8,
        layers=layers,
        layers_in_words="two bodies and a pool",
        has_stem=False,
        smallest_image=2,
        head_expansion=3,
        official_names={"conv": "c"},
    )
    monkeypatch.setitem(NETWORKS, "tiny", record)
    rng = np.random.default_rng(0)
    shapes = {"0.weight": (8, 3, 3, 3), "1.weight": (8,), "1.bias": (8,)}
    client = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    shapes = {"1.c.weight": (16, 8, 3, 3), "1.bn.weight": (16,), "1.bn.bias": (16,)}
    shapes |= {"3.0.weight": (12, 16), "3.0.bias": (12,), "3.2.weight": (4, 12), "3.2.bias": (4,)}
    server = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    network: dict[str, Any] = {"name": "tiny", "cut_layer": 1, "image_size": 4, "key_dim": 4}
    params = from_official(client, server, **network)
    np.testing.assert_array_equal(params[0]["layer0"]["norm"]["scale"], client["1.weight"])
    kernel = server["1.c.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params[1]["layer2"]["conv"]["kernel"], kernel)
    np.testing.assert_array_equal(params[1]["head"]["out"]["kernel"], server["3.2.weight"].T)
    model = split_model(**network)
    assert model.whole_backbone(params, jnp.ones((3, 4, 4, 3))).shape == (3, 16)
    for change, message in (
        ({"cut_layer": 3}, r"^cut_layer: found 3, allowed: 0 to 2 for tiny .*of two bodies and a pool are"),
        ({"width": 4}, "^width: found 4, allowed: multiples of 8 for tiny, or None for the paper's 8"),
        ({"image_size": 1}, "^image_size: found 1, allowed: 2 or more for tiny"),
        ({"stem_stride": 1}, "^stem_stride: found 1, allowed: None for tiny"),
    ):
        with pytest.raises(UserError, match=message):
            split_model(**network | change)
