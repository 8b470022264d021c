"""An adversary of the clients: a simulated attacker, against which they are trained to hide their images.

As in ResSFL (Li et al., CVPR 2022) and TAResSFL (Li et al., ICLR 2023), clients and server minimise, and a
decoder G maximises,

    contrastive loss + lambda * similarity(G(smashed queries), query views)

with a hinge: the similarity counts only where it is above a target. In a step the decoder is trained first.
Then the regulariser sends its gradient with respect to the smashed queries back to the clients, added to that
of the server.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax.algorithm import optim
from mocosfl_jax.models.decoders import Decoder

Similarity = Callable[[Array, Array], Array]  # images and others [n, H, W, 3] in [0, 1] -> [n]
HINGES = ("image", "batch")


class Adversary(NamedTuple):
    """An adversary as pure functions. Its state holds arrays only."""

    init: Callable[[Array], Any]  # rng -> state
    # state, smashed queries [n, h, w, c], query views [n, H, W, 3], training step [] -> new state, and the
    # gradient of the regulariser with respect to the smashed queries
    step: Callable[[Any, Array, Array, Array], tuple[Any, Array]]


class AdversaryState(NamedTuple):
    """The state of a decoder that is trained against clients."""

    params: Any
    statistics: Any  # running, of batch norms
    opt_state: Any
    # [2], means over the steps of the present epoch: the similarity that the decoder was trained on, before
    # its update, and the one that the regulariser saw after it
    similarity: Array


def decoder_adversary(
    decoder: Decoder,
    similarity: Similarity,
    to_images: Callable[[Array], Array],
    *,
    strength: float,
    target: float,
    hinge: str = "image",
    batch_statistics: bool = True,
    optimizer: optax.GradientTransformation,
    steps_per_epoch: int,
) -> Adversary:
    """A decoder that learns to turn smashed queries into images while the clients learn to prevent it.

    Example:
      >>> from mocosfl_jax.models.decoders import make_decoder
      >>> from mocosfl_jax.privacy.similarity import ssim
      >>> adversary = decoder_adversary(
      ...     make_decoder("custom", (4, 4, 2), image_size=8),
      ...     ssim,
      ...     to_images=lambda views: 0.25 * views + 0.5,
      ...     strength=2.0,
      ...     target=0.6,
      ...     optimizer=optim.adam(1e-3),
      ...     steps_per_epoch=10,
      ... )
      >>> state = adversary.init(jax.random.key(0))
      >>> state, grad = adversary.step(state, jnp.zeros((5, 4, 4, 2)), jnp.zeros((5, 8, 8, 3)), jnp.array(0))
      >>> grad.shape
      (5, 4, 4, 2)

    Args:
      decoder: From `make_decoder`, for smashed data and images of these sizes.
      similarity: What the decoder maximises, of each image.
      to_images: Query views [n, H, W, 3] -> images in [0, 1], which the decoder is to find.
      strength: Lambda.
      target: Similarity up to which there is no gradient.
      hinge: "image": each image counts for what it is above the target. "batch": the mean over the batch
        does, as in the official code, so single images may be far above it.
      batch_statistics: Whether batch norms use the statistics of the batch for the regulariser, as they do
        when the decoder is trained. Otherwise they use their running ones, as in the official code.
      optimizer: Of the decoder.
      steps_per_epoch: Over which the similarities in the state are means.

    Returns:
      The adversary, whose state is an `AdversaryState`.

    Raises:
      ValueError: If a setting is impossible.
    """
    if not 0 <= strength < jnp.inf:
        raise ValueError(f"strength: found {strength}, allowed: 0 or more")
    if not 0 < target < 1:
        raise ValueError(f"target: found {target}, allowed: more than 0, less than 1")
    if hinge not in HINGES:
        raise ValueError(f"hinge: found {hinge!r}, allowed: {', '.join(HINGES)}")

    def init(rng: Array) -> AdversaryState:
        params, statistics = decoder.init(rng)
        return AdversaryState(params, statistics, optimizer.init(params), jnp.zeros(2))

    def step(
        state: AdversaryState, smashed: Array, views: Array, number: Array
    ) -> tuple[AdversaryState, Array]:
        images = to_images(views)

        def found(params: Any, statistics: Any, smashed: Array, *, training: bool) -> tuple[Array, Any]:
            """The similarity of each reconstruction [n], and new statistics."""
            pictures, statistics = decoder.apply(
                params, statistics, smashed.astype(jnp.float32), training=training
            )
            return similarity(pictures, images), statistics

        def decoder_loss(params: Any) -> tuple[Array, Any]:
            each, statistics = found(params, state.statistics, smashed, training=True)
            return -jnp.mean(each), statistics

        (loss, statistics), grads = jax.value_and_grad(decoder_loss, has_aux=True)(state.params)
        params, opt_state = optim.descend(optimizer, grads, state.opt_state, state.params, number)

        def regulariser(smashed: Array) -> tuple[Array, Array]:
            each, _ = found(params, statistics, smashed, training=batch_statistics)
            counted = each if hinge == "image" else jnp.mean(each)
            return strength * jnp.mean(jax.nn.relu(counted - target)), jnp.mean(each)

        smashed_grad, seen = jax.grad(regulariser, has_aux=True)(smashed)
        done = number % steps_per_epoch  # steps of this epoch before this one
        mean = (done * state.similarity + jnp.stack([-loss, seen])) / (done + 1)
        return AdversaryState(params, statistics, opt_state, mean), smashed_grad

    return Adversary(init, step)
