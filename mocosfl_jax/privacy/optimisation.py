"""An attack without a decoder and without images: search for images that have the victims' smashed data."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from mocosfl_jax.feed.augment import normalise

START_NOISE = 0.05  # standard deviation of the first images, for pixels in [0, 1]


def optimise_images(
    rng: Array,
    client: Callable[[Array], Array],
    smashed: ArrayLike,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    steps: int = 1000,
    learning_rate: float = 0.05,
    total_variation: float = 0.003,
) -> Array:
    """Change images step by step until the client sends the victims' smashed data for them.

    Adam minimises the squared error of each victim's smashed data, in terms of their mean square, plus
    `total_variation` times the mean difference between neighbouring pixels. Pixels are clipped to [0, 1]
    after each step. The first images are the mean colour with a little noise: behind convolutions without
    biases, group norm and ReLU, the gradient at an image of one colour is zero.

    The idea is the attack of ResSFL (Li et al., CVPR 2022), which has AMSGrad with a learning rate of 0.8
    from an image of one colour, no bounds and no prior; it did not converge on clients with group norm.

    Args:
      rng: a key, for the noise of the first images, which is the same for all victims.
      client: the client-side model, normalised images [m, H, W, 3] -> [m, h, w, c].
      smashed: [m, h, w, c] smashed data of the victims.
      image_size: in pixels.
      mean: of each channel, with which the client's images are normalised.
      std: of each channel.
      steps: of the search.
      learning_rate: of Adam, for pixels in [0, 1].
      total_variation: weight of the differences between neighbours. Large weights take contrast from images,
        since group norm hides most of the contrast from smashed data.

    Returns:
      [m, H, W, 3] float32 in [0, 1].

    Example:
      >>> white = jnp.ones((1, 4, 4, 3))
      >>> found = optimise_images(
      ...     jax.random.key(0), lambda x: x, white, 4, mean=(0.5,) * 3, std=(0.5,) * 3, steps=100
      ... )
      >>> bool(jnp.abs(found - white).max() < 0.05)
      True
    """
    smashed = jnp.asarray(smashed)
    scale = jnp.mean(jnp.square(smashed), axis=(1, 2, 3))
    scale = jnp.where(scale > 0, scale, 1)
    optimizer = optax.adam(learning_rate)

    def loss(images: Array) -> Array:
        inputs = normalise(images, mean, std)
        error = jnp.mean(jnp.square(client(inputs) - smashed), axis=(1, 2, 3)) / scale
        # A sum over victims, so that no victim's search depends on the others.
        return jnp.sum(error + total_variation * _variation(images))

    @jax.jit
    def search(images: Array) -> Array:
        def step(_: int, state: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
            images, opt_state = state
            updates, opt_state = optimizer.update(jax.grad(loss)(images), opt_state)
            return jnp.clip(optax.apply_updates(images, updates), 0, 1), opt_state

        return jax.lax.fori_loop(0, steps, step, (images, optimizer.init(images)))[0]

    colour = jnp.asarray(mean, jnp.float32)[None, None, :]
    first = colour + START_NOISE * jax.random.normal(rng, (image_size, image_size, 3))
    return search(jnp.broadcast_to(jnp.clip(first, 0, 1), (len(smashed), *first.shape)))


def _variation(images: Array) -> Array:
    """[m]: mean absolute difference between neighbours, of rows plus of columns."""
    of_axes = [jnp.mean(jnp.abs(jnp.diff(images, axis=axis)), axis=(1, 2, 3)) for axis in (1, 2)]
    return of_axes[0] + of_axes[1]
