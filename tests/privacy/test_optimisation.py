"""The attack by optimisation, on clients that can be inverted."""

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax.feed.augment import normalise
from mocosfl_jax.privacy.optimisation import optimise_images

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def test_an_invertible_client_is_inverted() -> None:
    """A rotation of each pixel's colours, so that only one image has the smashed data."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0].astype(np.float32)
    images = np.random.default_rng(1).uniform(0.1, 0.9, (2, 4, 4, 3)).astype(np.float32)

    def client(x: jax.Array) -> jax.Array:
        return x @ rotation

    found = optimise_images(client, client(normalise(images, MEAN, STD)), 4, MEAN, STD, steps=400)
    np.testing.assert_allclose(found, images, atol=0.01)


def test_without_information_the_mean_colour_is_left() -> None:
    found = optimise_images(jnp.zeros_like, jnp.zeros((1, 4, 4, 3)), 4, MEAN, STD, steps=5)
    np.testing.assert_allclose(found, np.broadcast_to(np.array(MEAN), (1, 4, 4, 3)), rtol=1e-6)


def test_victims_do_not_depend_on_each_other() -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 2))
    smashed = jax.random.normal(jax.random.key(1), (3, 4, 4, 2))
    together = optimise_images(lambda x: jax.nn.relu(x @ kernel), smashed, 4, MEAN, STD, steps=20)
    alone = optimise_images(lambda x: jax.nn.relu(x @ kernel), smashed[1:2], 4, MEAN, STD, steps=20)
    np.testing.assert_allclose(together[1:2], alone, atol=1e-4)
