"""A judge of clients that were trained against a decoder: a decoder that is trained afresh.

Clients can fool the decoder in the training loop without hiding their images. Then a fresh decoder
reconstructs them better.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mocosfl_jax.models.decoders import Decoder
from mocosfl_jax.models.forms import Forms
from mocosfl_jax.privacy import inversion, protocol
from mocosfl_jax.privacy.inversion import Training, Weights
from mocosfl_jax.privacy.protocol import Client
from mocosfl_jax.privacy.similarity import ssim


class Verdict(NamedTuple):
    """Mean SSIM over the same clean images, none of which a decoder was trained on."""

    in_loop: float  # of the decoder in the training loop
    fresh: float  # of the decoder that was trained afresh, in evaluation mode


def judge(
    client: Client,
    decoder: Decoder,
    in_loop: Weights,
    *,
    images: np.ndarray,
    victims: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    fresh: Decoder,
    training: Training,
    rng: Array,
    batch_statistics: bool,
    forms: Forms,
) -> Verdict:
    """Compare the decoder of the training loop with one that is trained afresh against the same client.

    Args:
      client: The client-side model.
      decoder: That of the training loop.
      in_loop: Its weights.
      images: [n, H, W, 3] uint8, on which the fresh decoder is trained.
      victims: [m, H, W, 3] uint8, on which both are compared.
      mean: Of each channel, by which the client's images are normalised.
      std: Of each channel.
      fresh: The decoder that is trained afresh, as `train_decoder` takes it.
      training: How; its loss should be what the loop's decoder learns.
      rng: For the fresh decoder.
      batch_statistics: Whether the decoder of the loop uses the statistics of the victims in its batch norms.
      forms: Of the platform.
    """
    smashed = protocol.smash(client, protocol.clean(victims, mean, std).inputs)
    truth = victims / np.float32(255)
    found, _ = jax.jit(decoder.apply, static_argnames="training")(
        *in_loop, smashed, training=batch_statistics
    )
    known = protocol.smash(client, protocol.clean(images, mean, std).inputs)
    trained = inversion.train_decoder(
        rng[None], known[None], images[None], decoder=fresh, training=training, forms=forms
    )
    anew = inversion.reconstruct(fresh, trained.weights, smashed[None], forms=forms)[0]
    return Verdict(*(float(jnp.mean(ssim(pictures, truth))) for pictures in (found, anew)))
