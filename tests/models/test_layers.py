"""Each layer against a plain implementation."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.models import layers, norms
from mocosfl_jax.models.convolution import direct_conv, patches_conv
from mocosfl_jax.models.layers import Options

OPTIONS = Options(patches_conv, norms.group_norm, weight_standardisation=True, norm="group", residual=True)
XAVIER = dataclasses.replace(OPTIONS, init="xavier")


def test_standardise_equals_numpy(x64: None) -> None:
    kernel = np.random.default_rng(2).normal(2.0, 3.0, size=(3, 3, 5, 4))
    flat = kernel.reshape(-1, 4)
    expected = (flat - flat.mean(axis=0)) / (flat.std(axis=0, ddof=1) + 1e-5)
    np.testing.assert_allclose(
        layers.standardise(jnp.asarray(kernel)), expected.reshape(kernel.shape), rtol=1e-12
    )


@pytest.mark.parametrize("size", [6, 7])
def test_max_pool_equals_numpy_and_the_first_maximum_takes_the_gradient(size: int) -> None:
    x = np.random.default_rng(6).integers(0, 3, size=(2, size, size, 3)).astype(np.float32)
    expected, taken = np.zeros((2, 3, 3, 3)), np.zeros_like(x)
    for n, i, j, c in np.ndindex(*expected.shape):
        window = x[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        expected[n, i, j, c] = window.max()
        row, column = np.unravel_index(window.argmax(), (2, 2))
        taken[n, 2 * i + row, 2 * j + column, c] = 1
    np.testing.assert_array_equal(layers.max_pool(jnp.asarray(x)), expected)
    gradient = jax.grad(lambda x: jnp.sum(layers.max_pool(x)))(jnp.asarray(x))
    np.testing.assert_array_equal(gradient, taken)


def plain_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, group: int) -> np.ndarray:
    groups = x.astype(np.float64).reshape(*x.shape[:3], -1, group)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    variance = groups.var(axis=(1, 2, 4), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias


@pytest.mark.parametrize("norm, group", [("group", 4), ("layer", 12), ("instance", 1)])
@pytest.mark.parametrize("offset, rtol", [(0.0, 1e-5), (1000.0, 1e-3)])
def test_norms_equal_numpy_also_far_from_zero(norm: str, group: int, offset: float, rtol: float) -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(2, 6, 6, 12)) + offset).astype(np.float32)
    scale, bias = rng.normal(size=12).astype(np.float32), rng.normal(size=12).astype(np.float32)
    module = layers.Norm(dataclasses.replace(OPTIONS, norm=norm))
    got: Any = module.apply({"params": {"scale": scale, "bias": bias}}, jnp.asarray(x))
    np.testing.assert_allclose(got, plain_norm(x, scale, bias, group), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("form", [norms.group_norm, norms.fused_group_norm])
@pytest.mark.parametrize("group, size", [(4, 6), (12, 7), (1, 1)])
def test_group_norm_has_the_values_and_gradients_of_its_plain_form(
    x64: None, form: norms.GroupNorm, group: int, size: int
) -> None:
    rng = np.random.default_rng(9)
    x, weight = (jnp.asarray(rng.normal(1.0, 2.0, size=(3, size, size, 12))) for _ in range(2))
    scale, bias = jnp.asarray(rng.normal(size=12)), jnp.asarray(rng.normal(size=12))

    def plain(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        groups = x.reshape(*x.shape[:3], -1, group)
        mean = jnp.mean(groups, axis=(1, 2, 4), keepdims=True)
        variance = jnp.var(groups, axis=(1, 2, 4), keepdims=True)
        shape = (1, 1, 1, 12)
        normed = ((groups - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
        return normed * scale.reshape(shape) + bias.reshape(shape)

    def gradients(norm: Any) -> Any:
        return jax.jit(jax.grad(lambda *args: jnp.sum(weight * norm(*args)), (0, 1, 2)))(x, scale, bias)

    def ours(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return form(x, scale, bias, group)

    np.testing.assert_allclose(ours(x, scale, bias), plain(x, scale, bias), rtol=1e-9, atol=1e-10)
    pairs = zip(gradients(ours), gradients(plain), strict=True)
    for got, expected in pairs:
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype, rtol", [(jnp.float32, 2e-5), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("form", [norms.group_norm, norms.fused_group_norm])
def test_the_variance_of_a_norm_does_not_cancel(form: norms.GroupNorm, dtype: Any, rtol: float) -> None:
    """Pixels of 100 +- 3, and of 1,000 +- 3 in float32, against float64 on the same rounded pixels."""
    rng = np.random.default_rng(3)
    scale, bias = np.linspace(0.5, 2.0, 8), np.linspace(-1.0, 1.0, 8)
    for mean in (100.0, 1000.0) if dtype == jnp.float32 else (100.0,):
        x = jnp.asarray(rng.normal(mean, 3.0, size=(2, 8, 8, 8)), dtype)
        found = form(x, jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32), 4)
        expected = plain_norm(np.asarray(x, np.float64), scale, bias, 4)
        assert found.dtype == dtype
        error = np.abs(np.asarray(found, np.float64) - expected)
        assert error.max() < rtol * (mean / 100) * np.abs(expected).max(), mean


@pytest.mark.parametrize("form", [norms.group_norm, norms.fused_group_norm])
def test_a_constant_image_has_a_finite_gradient(form: norms.GroupNorm) -> None:
    """Where the variance is 0, rounding may make the difference of means negative."""
    x = jnp.full((1, 5, 5, 4), 77.7, jnp.bfloat16)
    value, grad = jax.value_and_grad(lambda x: jnp.sum(form(x, jnp.ones(4), jnp.ones(4), 4)))(x)
    assert np.isfinite(float(value)) and np.all(np.isfinite(np.asarray(grad, np.float32)))


@pytest.mark.parametrize("form", [norms.image_batch_norm, norms.cpu_image_batch_norm])
@pytest.mark.parametrize("images, size", [(4, 6), (3, 5), (1, 1)])
def test_batch_norm_of_images_has_the_values_and_gradients_of_its_plain_form(
    x64: None, form: norms.ImageBatchNorm, images: int, size: int
) -> None:
    rng = np.random.default_rng(11)
    shape = (2, images, size, size, 5)  # of two stacked models
    x, weight = (jnp.asarray(rng.normal(3.0, 2.0, shape)) for _ in range(2))
    scale, bias = (jnp.asarray(rng.normal(size=(2, 5))) for _ in range(2))

    def plain(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        mean = jnp.sum(x, axis=(0, 1, 2), keepdims=True) / (images * size * size)
        variance = jnp.sum((x - mean) ** 2, axis=(0, 1, 2), keepdims=True) / (images * size * size)
        normalised = (x - mean) / jnp.sqrt(variance + 1e-5)
        return normalised * scale.reshape(1, 1, 1, 5) + bias.reshape(1, 1, 1, 5)

    def loss(norm: Any) -> Any:
        return jax.vmap(
            jax.grad(lambda x, scale, bias, weight: jnp.sum(weight * norm(x, scale, bias)), (0, 1, 2))
        )

    found, mean, variance = jax.vmap(form)(x, scale, bias)
    np.testing.assert_allclose(found, jax.vmap(plain)(x, scale, bias), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(mean, x.mean((1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(variance, x.var((1, 2, 3)), rtol=1e-9, atol=1e-10)
    gradients = loss(lambda *args: form(*args)[0])(x, scale, bias, weight)
    for got, expected in zip(gradients, loss(plain)(x, scale, bias, weight), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)
    of_statistics = jax.grad(lambda x: sum(jnp.sum(s) for s in form(x, scale[0], bias[0])[1:]))(x[0])
    assert not np.any(of_statistics)


def test_batch_norm_treats_views_as_separate_batches(x64: None) -> None:
    x = jnp.asarray(np.random.default_rng(10).normal(size=(2, 5, 3)))
    module = layers.BatchNorm()
    together: Any = module.apply(module.init(jax.random.key(0), x), x)
    for view, out in zip(x, together, strict=True):
        np.testing.assert_allclose(out, norms.batch_norm(view, jnp.ones(3), jnp.zeros(3)), rtol=1e-12)


def test_head_with_batch_norm_equals_numpy(x64: None) -> None:
    rng = np.random.default_rng(7)
    hidden = {"kernel": rng.normal(size=(5, 6)), "bias": rng.normal(size=6)}
    norm = {"scale": rng.normal(size=6), "bias": rng.normal(size=6)}
    out = {"kernel": rng.normal(size=(6, 3)), "bias": rng.normal(size=3)}
    x = rng.normal(size=(4, 5))
    h = x @ hidden["kernel"] + hidden["bias"]
    h = (h - h.mean(axis=0)) / np.sqrt(h.var(axis=0) + 1e-5) * norm["scale"] + norm["bias"]
    head = layers.ProjectionHead(key_dim=3, hidden_dim=6, batch_norm=True)
    got: Any = head.apply({"params": {"hidden": hidden, "norm": norm, "out": out}}, jnp.asarray(x))
    np.testing.assert_allclose(got, np.maximum(h, 0) @ out["kernel"] + out["bias"], rtol=1e-12)


@pytest.mark.parametrize("weight_standardisation", [True, False])
def test_convolution_adds_its_bias_and_standardises_on_request(weight_standardisation: bool) -> None:
    rng = np.random.default_rng(8)
    x, kernel, bias = rng.normal(size=(1, 4, 4, 3)), rng.normal(size=(3, 3, 3, 2)), rng.normal(size=2)
    flat = kernel.reshape(-1, 2)
    if weight_standardisation:
        flat = (flat - flat.mean(axis=0)) / (flat.std(axis=0, ddof=1) + 1e-5)
    kernel_used = jnp.asarray(flat.reshape(kernel.shape))
    expected = direct_conv(jnp.asarray(x), kernel_used, stride=1, padding=1) + bias.reshape(1, 1, 1, -1)
    options = dataclasses.replace(OPTIONS, weight_standardisation=weight_standardisation)
    got: Any = layers.Conv(2, 3, 1, options, bias=True).apply(
        {"params": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}, jnp.asarray(x)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module, fan_in, fan_out",
    [
        (layers.Conv(64, 3, 1, XAVIER, bias=True), 9 * 32, 9 * 64),
        (layers.TransposedConv(64, XAVIER), 9 * 32, 9 * 64),
        # PyTorch computes both from a weight of shape [32, 1, 3, 3].
        (layers.DepthwiseConv(1, XAVIER), 9, 9 * 32),
    ],
)
def test_kernels_start_xavier_uniform_and_biases_at_zero(
    module: nn.Module, fan_in: int, fan_out: int
) -> None:
    params = module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 32)))["params"]
    bound = np.sqrt(6 / (fan_in + fan_out))
    largest, std = np.abs(params["kernel"]).max(), np.std(params["kernel"])
    assert 0.9 * bound < largest <= bound
    assert abs(std / (bound / np.sqrt(3)) - 1) < 0.1
    assert not np.any(params.get("bias", 0))
