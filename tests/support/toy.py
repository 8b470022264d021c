"""A toy network, views for it, and command lines with it."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mocosfl_jax import SplitModel, Views, train
from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.training import checkpoint
from tests.support.training import prepare

IMAGE = (4, 4, 3)
KEY_DIM = 8


def make_toy_model() -> SplitModel:
    """Two layers, one on each side of the cut. It compiles quickly, and any network fits SplitModel."""

    def init(rng: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        rng_client, rng_server, rng_head = jax.random.split(rng, 3)
        return (
            {"kernel": 0.5 * jax.random.normal(rng_client, (IMAGE[-1], 5))},
            {
                "kernel": 0.3 * jax.random.normal(rng_server, (16 * 5, 12)),
                "head": 0.3 * jax.random.normal(rng_head, (12, KEY_DIM)),
            },
        )

    def client(params: dict[str, Array], images: Array) -> Array:
        return jnp.tanh(images @ params["kernel"])

    def backbone(params: dict[str, Array], smashed: Array) -> Array:
        return jnp.tanh(smashed.reshape(*smashed.shape[:-3], -1) @ params["kernel"])

    def head(params: dict[str, Array], backbone: Array) -> Array:
        return backbone @ params["head"]

    return SplitModel(init, client, backbone, head, KEY_DIM)


def with_toy(argv: Sequence[str]) -> list[str]:
    """The command line `argv` of a command, with the toy network instead of the quickstart's."""
    file = pathlib.Path(__file__).with_name("toy_config.py")
    return [argv[0], f"--config={file}", *argv[1:]]


def last_arrays(argv: Sequence[str], folder: pathlib.Path) -> list[np.ndarray]:
    """All arrays of the newest checkpoint of a run with the toy network, restored on one device."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(last_state(with_toy(argv), folder))]


def last_state(argv: Sequence[str], folder: pathlib.Path) -> TrainState:
    """The newest checkpoint of a run, restored on one device."""
    config, *_ = train.parse(argv)
    run = prepare(config)
    state, _ = checkpoint.restore(folder / "checkpoints", None, run.algorithm, jax.devices()[0])
    return state


def random_views(seed: int, clients: int, batch: int) -> Views:
    """Views for the toy network: Gaussian images [clients, batch, 4, 4, 3]."""
    rng_query, rng_key = jax.random.split(jax.random.key(seed))
    shape = (clients, batch, *IMAGE)
    return Views(jax.random.normal(rng_query, shape), jax.random.normal(rng_key, shape))
