"""The attack by optimisation, on clients that can be inverted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mocosfl_jax import split_model
from mocosfl_jax.feed.augment import normalise
from mocosfl_jax.models.forms import CPU
from mocosfl_jax.privacy.optimisation import optimise_images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RNG = jax.random.key(0)


def test_an_invertible_client_is_inverted() -> None:
    """A rotation of each pixel's colours, so that only one image has the smashed data."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0].astype(np.float32)
    images = np.random.default_rng(1).uniform(0.1, 0.9, (2, 4, 4, 3)).astype(np.float32)

    def client(x: jax.Array) -> jax.Array:
        return x @ rotation

    smashed = client(normalise(images, MEAN, STD))
    found = optimise_images(RNG, client, smashed, 4, MEAN, STD, steps=400, total_variation=0)
    np.testing.assert_allclose(found, images, atol=0.01)


@pytest.fixture
def pictures() -> np.ndarray:
    """Smooth pictures of 16x16 pixels."""
    colours = np.random.default_rng(0).integers(0, 256, (3, 3, 3, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(c).resize((16, 16))) for c in colours]) / np.float32(255)


def convolution_and_group_norm(stride: int) -> Callable[[jax.Array], jax.Array]:
    """The stem of a ResNet, whose group norm has biases as after some training."""
    model = split_model("resnet18", cut_layer=1, width=16, image_size=16, stem_stride=stride, forms=CPU)
    params, _ = model.init(jax.random.key(1))
    flat, tree = jax.tree.flatten(params)
    rngs = jax.random.split(jax.random.key(2), len(flat))
    trained = [
        leaf + 0.3 * jax.random.normal(rng, leaf.shape) if leaf.ndim == 1 else leaf
        for leaf, rng in zip(flat, rngs, strict=True)
    ]
    return lambda images: model.client(jax.tree.unflatten(tree, trained), images)


@pytest.mark.parametrize("stride, level", [(1, 0.05), (2, 0.6)])
def test_convolutions_with_group_norm_are_inverted(pictures: np.ndarray, stride: int, level: float) -> None:
    """An image of one colour has no gradient at first, and the first gradients are larger than all others."""
    client = convolution_and_group_norm(stride)
    smashed = client(normalise(pictures, MEAN, STD))
    found = optimise_images(RNG, client, smashed, 16, MEAN, STD, steps=300)
    assert found.min() >= 0 and found.max() <= 1
    assert np.mean((found - pictures) ** 2) < level * np.mean((pictures - np.array(MEAN)) ** 2)


def test_without_information_the_mean_colour_is_left() -> None:
    found = optimise_images(RNG, jnp.zeros_like, jnp.zeros((1, 8, 8, 3)), 8, MEAN, STD, steps=50)
    np.testing.assert_allclose(found, np.broadcast_to(np.array(MEAN), (1, 8, 8, 3)), atol=0.1)


def test_images_stay_in_their_range() -> None:
    """Smashed data that no image has: black and white come nearest."""
    smashed = jnp.array([-9.0, 9.0]).reshape(2, 1, 1, 1) * jnp.ones((2, 4, 4, 3))
    found = optimise_images(RNG, lambda x: x, smashed, 4, MEAN, STD, steps=100)
    np.testing.assert_array_equal(found, np.broadcast_to([[[[0]]], [[[1]]]], found.shape))


def test_victims_do_not_depend_on_each_other() -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 2))
    smashed = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))

    def client(x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ kernel)

    together = optimise_images(RNG, client, smashed, 4, MEAN, STD, steps=20)
    alone = optimise_images(RNG, client, smashed[1:2], 4, MEAN, STD, steps=20)
    np.testing.assert_allclose(together[1:2], alone, atol=1e-4)
