"""A small encoder."""

from typing import Any

import jax
import numpy as np

from mocosfl_jax.models import split_model
from mocosfl_jax.weights.encoder_file import Metadata

NETWORK: dict[str, Any] = {"name": "resnet18", "cut_layer": 1, "width": 4, "key_dim": 6, "bottleneck": "C4S2"}


METADATA = Metadata(NETWORK, (0.1, 1 / 3, 0.3), (0.5, 0.25, 1.0), "a test")


def random_params() -> Any:
    """Values of all magnitudes, including negative zeros and denormals."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.integers(0, 0x7F80_0000, leaf.shape, np.uint32).view(np.float32) * rng.choice([-1, 0, 1])

    return jax.tree.map(draw, jax.eval_shape(split_model(**NETWORK).init, jax.random.key(0)))
