"""The quickstart with the toy network, for commands: `--config=tests/support/toy_config.py`."""

from typing import Any

from mocosfl_jax import SplitModel
from mocosfl_jax.config import Config, Own, quickstart
from tests.support.toy import make_toy_model


def network(config: Any, image_size: int, forms: Any) -> SplitModel:
    return make_toy_model()


def get_config() -> Config:
    config = quickstart()
    config.own = Own(network=network)
    return config
