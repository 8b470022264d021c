"""Each kernel against the plain form of what it computes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.models import layers


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
@pytest.mark.parametrize("conv", [layers.direct_conv, layers.patches_conv])
def test_convolution_equals_loops(
    x64: None, conv: layers.Convolution, size: int, k: int, stride: int
) -> None:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, size, size, 3)), rng.normal(size=(k, k, 3, 4))
    got = conv(jnp.asarray(x), jnp.asarray(kernel), stride=stride, padding=k // 2)
    np.testing.assert_allclose(got, plain_conv(x, kernel, stride, k // 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (1, 2)])
def test_patches_have_the_gradients_of_the_convolution(x64: None, k: int, stride: int) -> None:
    rng = np.random.default_rng(1)
    x, kernel = jnp.asarray(rng.normal(size=(2, 8, 8, 3))), jnp.asarray(rng.normal(size=(k, k, 3, 4)))

    def gradients(conv: layers.Convolution) -> tuple[jax.Array, jax.Array]:
        return jax.grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w, stride=stride, padding=k // 2))), (0, 1))(
            x, kernel
        )

    for direct, patches in zip(gradients(layers.direct_conv), gradients(layers.patches_conv), strict=True):
        np.testing.assert_allclose(patches, direct, rtol=1e-10, atol=1e-12)


def test_standardise_equals_numpy(x64: None) -> None:
    kernel = np.random.default_rng(2).normal(2.0, 3.0, size=(3, 3, 5, 4))
    flat = kernel.reshape(-1, 4)
    expected = (flat - flat.mean(axis=0)) / (flat.std(axis=0, ddof=1) + 1e-5)
    np.testing.assert_allclose(
        layers.standardise(jnp.asarray(kernel)), expected.reshape(kernel.shape), rtol=1e-12
    )


def plain_group_norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    groups = x.astype(np.float64).reshape(*x.shape[:3], -1, 4)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    variance = groups.var(axis=(1, 2, 4), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias


@pytest.mark.parametrize("offset, rtol", [(0.0, 1e-5), (1000.0, 1e-3)])
def test_group_norm_equals_numpy_also_far_from_zero(offset: float, rtol: float) -> None:
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(2, 6, 6, 12)) + offset).astype(np.float32)
    scale, bias = rng.normal(size=12).astype(np.float32), rng.normal(size=12).astype(np.float32)
    got = layers.group_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias))
    np.testing.assert_allclose(got, plain_group_norm(x, scale, bias), rtol=rtol, atol=rtol)
