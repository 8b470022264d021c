"""An attack without a decoder and without images: search for images that have the victims' smashed data."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike


def optimise_images(
    client: Callable[[Array], Array],
    smashed: ArrayLike,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    steps: int = 3000,
    learning_rate: float = 0.8,
) -> Array:
    """Change images step by step until the client sends the victims' smashed data for them.

    The attack of Li et al. (ResSFL, CVPR 2022): from images of zeros, which are normalised and so have the
    data set's mean colour, by AMSGrad on the mean squared error of smashed data, without any prior.

    Args:
      client: the client-side model, normalised images [m, H, W, 3] -> [m, h, w, c].
      smashed: [m, h, w, c] smashed data of the victims.
      image_size: in pixels.
      mean: of each channel, with which the client's images are normalised.
      std: of each channel.
      steps: of the search.
      learning_rate: of AMSGrad.

    Returns:
      [m, H, W, 3] float32, clipped to [0, 1].

    Example:
      >>> white = jnp.ones((1, 4, 4, 3))
      >>> found = optimise_images(lambda x: x, white, 4, (0.5,) * 3, (0.5,) * 3, steps=200)
      >>> bool(jnp.abs(found - white).max() < 0.05)
      True
    """
    smashed = jnp.asarray(smashed)
    optimizer = optax.amsgrad(learning_rate, eps=1e-3)

    def loss(images: Array) -> Array:
        # A sum over victims, so that no victim's search depends on the others.
        return jnp.sum(jnp.mean(jnp.square(client(images) - smashed), axis=(1, 2, 3)))

    @jax.jit
    def search(images: Array) -> Array:
        def step(_: int, state: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
            images, opt_state = state
            updates, opt_state = optimizer.update(jax.grad(loss)(images), opt_state)
            return optax.apply_updates(images, updates), opt_state

        return jax.lax.fori_loop(0, steps, step, (images, optimizer.init(images)))[0]

    found = search(jnp.zeros((len(smashed), image_size, image_size, 3)))
    shift, scale = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (mean, std))
    return jnp.clip(found * scale + shift, 0, 1)
