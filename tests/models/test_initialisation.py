"""Every tensor of every network is drawn as in the official code, or by Xavier initialisation."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from mocosfl_jax import mocosfl, split_model
from mocosfl_jax.models.named import NETWORKS

WIDTH = {"mobilenetv2": 16}
# Convolutions that are always standardised, and those that never are (`split_model`).
ALWAYS, NEVER = {"layer0/conv1"}, {"bottleneck", "head"}


def networks() -> list[Any]:
    """Each network. Networks that differ from another one only in depth are marked slow."""
    cases = []
    for name in NETWORKS:
        quick = name in ("resnet18", "resnet50", "vgg9", "vgg11", "mobilenetv2")
        marks = () if quick else (pytest.mark.slow,)
        cases += [pytest.param(name, standardised, marks=marks) for standardised in (True, False)]
    return cases


def is_standardised(name: str, path: str, weight_standardisation: bool) -> bool:
    """Whether the convolution at `path` is weight-standardised in the official code."""
    if path.split("/")[0] in NEVER or (name == "mobilenetv2" and "shortcut_conv" in path):
        return False
    if name.startswith("resnet") and path in ALWAYS:
        return True
    if name in ("resnet50", "resnet101", "resnet152") and "shortcut_conv" in path:
        return True
    return weight_standardisation


def assert_uniform(found: np.ndarray, bound: float, path: str) -> None:
    """Assert bounds, mean and standard deviation of the uniform distribution on [-bound, bound)."""
    assert np.abs(found).max() <= bound, path
    if found.size >= 16:
        assert np.abs(found).max() >= bound * (1 - 8 / found.size), path
    std, n = bound / math.sqrt(3), found.size
    # Five standard errors; the kurtosis of a uniform distribution is 1.8.
    assert abs(found.mean()) <= 5 * std / math.sqrt(n), path
    assert abs(found.var() - std**2) <= 5 * std**2 * math.sqrt(0.8 / n), path


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {
        "/".join(str(entry.key) for entry in path): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(dict(zip(("client", "server"), tree, strict=True)))
    }


@pytest.mark.parametrize("name, standardised", networks())
def test_every_tensor_is_drawn_as_in_the_official_code(name: str, standardised: bool) -> None:
    network: dict[str, Any] = {"width": WIDTH.get(name, 8), "key_dim": 16, "bottleneck": "C4S2"}
    drawn = {}
    for init in ("official", "xavier"):
        model = split_model(name, cut_layer=2, weight_standardisation=standardised, init=init, **network)
        rng = jax.random.key(3, impl="rbg")  # fast to compile
        drawn[init] = leaves(jax.jit(model.init)(rng))
    kernels = 0
    for init, tensors in drawn.items():
        for key, found in tensors.items():
            _, path = key.split("/", 1)
            module, leaf = path.rsplit("/", 1)
            kernel = tensors.get(f"{key.rsplit('/', 1)[0]}/kernel")
            if kernel is None:  # a norm
                np.testing.assert_array_equal(found, 1.0 if leaf == "scale" else 0.0, err_msg=key)
                continue
            area = math.prod(kernel.shape[:-2])
            fan_in, fan_out = area * kernel.shape[-2], area * kernel.shape[-1]
            if init == "official" and is_standardised(name, module, standardised):
                assert_uniform(found, 1 / math.sqrt(fan_in), key)
            elif leaf == "bias":
                np.testing.assert_array_equal(found, 0.0, err_msg=key)
            else:
                assert_uniform(found, math.sqrt(6 / (fan_in + fan_out)), key)
            kernels += leaf == "kernel"
    assert kernels >= 2 * 10


@pytest.mark.parametrize("init", ["official", "xavier"])
def test_clients_and_momentum_models_start_equal(init: str) -> None:
    model = split_model("vgg11", cut_layer=1, width=4, key_dim=8, init=init)
    algorithm = mocosfl(model, num_clients=3)
    state = jax.jit(lambda rng: algorithm.enter(algorithm.init(rng)))(jax.random.key(0))
    assert state.server is not None
    for params in (state.clients.params, state.clients.key_params):
        for leaf, first in zip(jax.tree.leaves(params), jax.tree.leaves(state.clients.params), strict=True):
            np.testing.assert_array_equal(leaf, np.broadcast_to(first[:1], leaf.shape))
    for leaf, key in zip(
        jax.tree.leaves(state.server.params), jax.tree.leaves(state.server.key_params), strict=True
    ):
        np.testing.assert_array_equal(leaf, key)
