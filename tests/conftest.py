"""Options, fixtures and the toy network of the tests."""

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from mocosfl_jax import Features, SplitModel, Views

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)

IMAGE = (4, 4, 3)
KEY_DIM = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(pathlib.Path(__file__).parent / "golden"),
        help="folder with the NAME.json / NAME.npz cases of test_golden.py",
    )


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def toy_model() -> SplitModel:
    return make_toy_model()


def make_toy_model() -> SplitModel:
    """Two layers, one on each side of the cut: compiles in no time, and any network fits SplitModel."""

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

    def server(params: dict[str, Array], smashed: Array) -> Features:
        backbone = jnp.tanh(smashed.reshape(len(smashed), -1) @ params["kernel"])
        return Features(backbone, backbone @ params["head"])

    return SplitModel(init, client, server, KEY_DIM)


def random_views(seed: int, clients: int, batch: int) -> Views:
    """Views for the toy network: Gaussian images [clients, batch, 4, 4, 3]."""
    rng_query, rng_key = jax.random.split(jax.random.key(seed))
    shape = (clients, batch, *IMAGE)
    return Views(jax.random.normal(rng_query, shape), jax.random.normal(rng_key, shape))
