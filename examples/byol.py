"""Your own algorithm: BYOL on the server in place of MoCo (Grill et al. 2020).

    python -m mocosfl_jax.train --config=examples/byol.py

A predictor maps each query to a guess of its key, and the loss is the distance between the two. No query is
compared with the keys of other images, so there is no queue. Clients, momentum models and synchronization
stay as they are.

The predictor learns with the server, so its parameters are among the server's. A contrast without parameters
of its own, such as InfoNCE within the batch, needs no `network`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from mocosfl_jax import Algorithm, Contrast, SplitModel, mocosfl, split_model
from mocosfl_jax.config import Config, Own, quickstart
from mocosfl_jax.training.build import network_arguments


class Predictor(nn.Module):
    """Queries [n, D] -> guesses of their keys [n, D]."""

    @nn.compact
    def __call__(self, query: Array) -> Array:
        hidden = nn.relu(nn.LayerNorm()(nn.Dense(256)(query)))
        return nn.Dense(query.shape[-1])(hidden)


predictor = Predictor()


def network(config: Any, image_size: int, forms: Any) -> SplitModel:
    """The network of `config.model`, with parameters of a predictor beside those of the server."""
    model = split_model(**network_arguments(config, image_size), forms=forms)

    def init(rng: Array) -> tuple[Any, Any]:
        rng_model, rng_predictor = jax.random.split(rng)
        client, server = model.init(rng_model)
        return client, server | {"predictor": predictor.init(rng_predictor, jnp.zeros((1, model.key_dim)))}

    return model._replace(init=init)


def byol(params: Any, query: Array, key: Array, similarities: Any) -> Contrast:
    """2 - 2 cos(guess, key), of queries and keys [n, D]. No gradient flows into the keys.

    The accuracy is the share of guesses that are nearest to their own key.
    """
    guess: Any = predictor.apply(params["predictor"], query)
    cosine = optax.losses.cosine_similarity(guess[:, None], key[None])  # [n, n]
    return Contrast(
        loss=jnp.mean(2 - 2 * jnp.diagonal(cosine)),
        top1=jnp.mean(jnp.argmax(cosine, axis=1) == jnp.arange(len(key))),
    )


def algorithm(config: Any, model: SplitModel, arguments: dict[str, Any]) -> Algorithm:
    """MocoSFL as configured, but for what the server learns."""
    return mocosfl(model, contrast=byol, **arguments)


def get_config() -> Config:
    config = quickstart()
    config.moco.queue_size = 0  # no queue
    config.own = Own(network=network, algorithm=algorithm)
    return config
