"""Every form of a convolution against loops or the direct form."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from mocosfl_jax import SplitModel, split_model
from mocosfl_jax.costs.flops import forward_flops
from mocosfl_jax.models import convolution
from mocosfl_jax.models.convolution import (
    Convolution,
    cpu_conv,
    depthwise_conv,
    direct_conv,
    grouped_conv,
    images_in_lanes,
    matmul_conv,
    patches_conv,
    transposed_conv,
    winograd_conv,
)
from mocosfl_jax.models.forms import ACCELERATOR, TPU

FORMS = [direct_conv, patches_conv, grouped_conv, cpu_conv, matmul_conv]


def plain_conv(x: np.ndarray, kernel: np.ndarray, stride: int, padding: int) -> np.ndarray:
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    k = kernel.shape[0]
    height, width = ((side - k) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((len(x), height, width, kernel.shape[3]))
    for i, j in itertools.product(range(height), range(width)):
        window = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
        out[:, i, j] = np.einsum("nabc,abco->no", window, kernel)
    return out


@pytest.mark.parametrize(
    "size, k, stride", [(8, 3, 1), (8, 3, 2), (7, 3, 2), (8, 1, 2), (2, 3, 1), (9, 7, 2)]
)
@pytest.mark.parametrize("conv", FORMS)
def test_convolution_equals_loops(x64: None, conv: Convolution, size: int, k: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, size, size, 3)), rng.normal(size=(k, k, 3, 4))
    got = conv(jnp.asarray(x), jnp.asarray(kernel), stride=stride, padding=k // 2)
    np.testing.assert_allclose(got, plain_conv(x, kernel, stride, k // 2), rtol=1e-12, atol=1e-12)


def gradients(conv: Callable[..., Array], x: Array, kernel: Array) -> tuple[Array, Array]:
    grads: Any = jax.jit(jax.grad(lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel))), (0, 1)))
    return grads(x, kernel)


@pytest.mark.parametrize("size, k, stride", [(8, 3, 1), (8, 3, 2), (8, 1, 2), (2, 3, 1)])
@pytest.mark.parametrize("conv", [patches_conv, grouped_conv, cpu_conv, matmul_conv])
def test_every_form_has_the_gradients_of_the_direct_one(
    x64: None, conv: Convolution, size: int, k: int, stride: int
) -> None:
    rng = np.random.default_rng(1)
    x, kernel = jnp.asarray(rng.normal(size=(2, size, size, 3))), jnp.asarray(rng.normal(size=(k, k, 3, 4)))
    got_and_expected = (
        gradients(partial(form, stride=stride, padding=k // 2), x, kernel) for form in (conv, direct_conv)
    )
    for got, of_direct in zip(*got_and_expected, strict=True):
        np.testing.assert_allclose(got, of_direct, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("images, channels", [(1, 3), (2, 5)])
@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (1, 2)])
@pytest.mark.parametrize("conv", [patches_conv, grouped_conv])
def test_stacked_clients_equal_a_loop_over_them(
    x64: None, conv: Convolution, k: int, stride: int, images: int, channels: int
) -> None:
    """Each client with its own kernel: values and gradients."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(3, images, 6, 6, channels)))
    kernels = jnp.asarray(rng.normal(size=(3, k, k, channels, 4)))
    stacked = jax.vmap(partial(conv, stride=stride, padding=k // 2))
    direct = partial(direct_conv, stride=stride, padding=k // 2)

    def loop(x: Array, kernels: Array) -> Array:
        return jnp.stack([direct(x[i], kernels[i]) for i in range(3)])

    np.testing.assert_allclose(stacked(x, kernels), loop(x, kernels), rtol=1e-12, atol=1e-12)
    for got, expected in zip(gradients(stacked, x, kernels), gradients(loop, x, kernels), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def case(dtype: str, n: int, height: int, width: int, channels: int, features: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(n, height, width, channels)), rng.normal(size=(3, 3, channels, features))
    return jnp.asarray(x, dtype), jnp.asarray(kernel / np.sqrt(9 * channels), dtype)


DIRECT = partial(direct_conv, stride=1, padding=1)


@pytest.mark.parametrize("cache", [1, 2**8, 2**40])  # images one by one, a few at a time, all together
@pytest.mark.parametrize("shape", [(6, 4, 6, 3, 5), (7, 2, 2, 5, 3), (1, 8, 4, 2, 2)])
def test_winograd_has_values_and_gradients_of_the_direct_form(
    x64: None, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], cache: int
) -> None:
    monkeypatch.setattr(convolution, "CACHE_ELEMENTS", cache)
    x, kernel = case("float64", *shape)
    np.testing.assert_allclose(winograd_conv(x, kernel), DIRECT(x, kernel), rtol=1e-12, atol=1e-12)
    pairs = zip(gradients(winograd_conv, x, kernel), gradients(DIRECT, x, kernel), strict=True)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_winograd_rounds_as_the_direct_form_does() -> None:
    x, kernel = case("float32", 4, 8, 8, 64, 64)
    with jax.enable_x64(True):
        exact = [
            np.asarray(array)
            for array in (
                DIRECT(x.astype("float64"), kernel.astype("float64")),
                *gradients(DIRECT, x.astype("float64"), kernel.astype("float64")),
            )
        ]

    def errors(conv: Callable[..., Array]) -> list[float]:
        arrays = (conv(x, kernel), *gradients(conv, x, kernel))
        return [float(np.std(a - e) / np.std(e)) for a, e in zip(arrays, exact, strict=True)]

    for winograd, direct in zip(errors(winograd_conv), errors(DIRECT), strict=True):
        assert winograd < 1e-6
        assert winograd < 5 * direct


def test_a_cpu_uses_winograd_for_many_channels() -> None:
    def multiplications(channels: int) -> int:
        x, kernel = case("float32", 2, 8, 8, channels, channels)
        return forward_flops(partial(cpu_conv, stride=1, padding=1), x, kernel) // 2

    assert multiplications(16) == 2 * 64 * 9 * 16**2
    assert multiplications(64) == 2 * 16 * 16 * 64**2  # 4 multiplications per pixel instead of 9


@pytest.mark.parametrize("n, wanted, size", [(200, 4, 4), (100, 15, 20), (97, 8, 1), (97, 20, 97), (6, 0, 1)])
def test_chunks_are_the_divisor_nearest_to_the_wanted_size(n: int, wanted: int, size: int) -> None:
    assert convolution._chunk(n, wanted) == size


@pytest.mark.parametrize("size, stride", [(8, 1), (8, 2), (7, 2), (1, 1)])
def test_depthwise_has_values_and_gradients_of_a_grouped_convolution(
    x64: None, size: int, stride: int
) -> None:
    rng = np.random.default_rng(4)
    x, kernel = jnp.asarray(rng.normal(size=(2, size, size, 6))), jnp.asarray(rng.normal(size=(3, 3, 1, 6)))

    def grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=6,
        )

    def shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return depthwise_conv(x, kernel, stride=stride, padding=1)

    np.testing.assert_allclose(shifted(x, kernel), grouped(x, kernel), rtol=1e-12, atol=1e-12)
    gradients = [
        jax.jit(jax.grad(lambda x, w, conv=conv: jnp.sum(jnp.sin(conv(x, w))), (0, 1)))(x, kernel)
        for conv in (shifted, grouped)
    ]
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_transposed_convolution_equals_loops(x64: None, size: int) -> None:
    rng = np.random.default_rng(5)
    x, kernel = rng.normal(size=(2, size, size, 3)), rng.normal(size=(3, 3, 3, 4))
    canvas = np.zeros((2, 2 * size + 2, 2 * size + 2, 4))
    for y, z, i, j in itertools.product(range(size), range(size), range(3), range(3)):
        canvas[:, 2 * y + i, 2 * z + j] += x[:, y, z] @ kernel[i, j]
    expected = canvas[:, 1:-1, 1:-1]  # padding 1 removes a row at each end, output padding 1 adds the last
    got = transposed_conv(jnp.asarray(x), jnp.asarray(kernel))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "images, channels, innermost",
    [
        (200, 64, True),  # 200 of 256 lanes against 64 of 128
        (128, 96, True),
        (26, 64, False),  # the rows of a device among eight
        (128, 128, False),
        (200, 128, False),
        (250, 512, False),
    ],
)
def test_images_lie_innermost_where_they_fill_the_lanes(images: int, channels: int, innermost: bool) -> None:
    x = jax.ShapeDtypeStruct((images, 2, 2, channels), jnp.float32)

    def layouts(jaxpr: Any) -> list[tuple[int, ...]]:
        return [
            equation.params["layout"].major_to_minor
            for equation in jaxpr.eqns
            if equation.primitive.name == "layout_constraint"
        ]

    wanted = [(0, 1, 2, 3), (1, 2, 3, 0)] if innermost else []
    assert layouts(jax.make_jaxpr(images_in_lanes)(x).jaxpr) == wanted
    _, pull = jax.vjp(images_in_lanes, jnp.zeros(x.shape))
    assert layouts(jax.make_jaxpr(pull)(x).jaxpr) == wanted[::-1]  # of the gradient too


def test_an_order_in_memory_changes_no_value() -> None:
    x = jnp.asarray(np.random.default_rng(6).normal(size=(2, 130, 2, 3, 4)))
    np.testing.assert_array_equal(images_in_lanes(x[0]), x[0])
    np.testing.assert_array_equal(jax.jit(jax.vmap(images_in_lanes))(x), x)


def test_the_server_of_a_tpu_arranges_its_input_once_in_each_direction() -> None:
    settings: Any = {"name": "resnet18", "cut_layer": 1, "width": 4, "image_size": 8, "key_dim": 8}
    tpu, other = (split_model(**settings, forms=each) for each in (TPU, ACCELERATOR))
    _, params = tpu.init(jax.random.key(0))
    smashed = jax.random.normal(jax.random.key(1), (130, 8, 8, 4))

    def gradient(model: SplitModel) -> Callable[..., Any]:
        return jax.grad(lambda params, x: jnp.sum(jnp.sin(model.server(params, x).projection)), (0, 1))

    constraints = [
        str(jax.make_jaxpr(gradient(m))(params, smashed)).count("layout_constraint") for m in (tpu, other)
    ]
    assert constraints == [4, 0]
    chex.assert_trees_all_close(
        jax.jit(gradient(tpu))(params, smashed),
        jax.jit(gradient(other))(params, smashed),
        rtol=1e-5,
        atol=1e-6,
    )
