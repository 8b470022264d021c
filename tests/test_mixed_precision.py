"""bfloat16 where it is allowed and nowhere else, and how far it drifts from float32."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import arguments
from jax import Array
from jax.extend import core

from mocosfl_jax import Algorithm, SplitModel, TrainState, Views, costs, encode, experiment, export, flmoco
from mocosfl_jax import load_encoder, mocosfl, split_model, train, workdir
from mocosfl_jax.config import quickstart
from mocosfl_jax.models.convolution import PLAIN, cpu_conv, direct_conv

CLIENTS, BATCH, SIZE = 3, 4, 16
STEPS = 50
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18", "cut_layer": 2, "width": 4, "bottleneck": "C4S2"},
    "resnet50": {"name": "resnet50", "cut_layer": 0, "width": 4, "norm": "layer", "head": "mlp_bn"},
    "vgg11": {"name": "vgg11", "cut_layer": 1, "width": 4, "image_size": 32},
    "mobilenetv2": {"name": "mobilenetv2", "cut_layer": 2, "width": 16, "norm": "instance"},
}


def build(compute_dtype: str, lr: float = 0.01, **changes: Any) -> tuple[SplitModel, Algorithm]:
    network = NETWORKS["resnet18"] | {"image_size": SIZE, "key_dim": 16} | changes
    model = split_model(**network, compute_dtype=compute_dtype)
    return model, mocosfl(model, num_clients=CLIENTS, queue_size=48, temperature=1.0, server_lr=lr, client_lr=lr)


def shapes(algorithm: Algorithm, size: int) -> tuple[TrainState, Views]:
    view = jax.ShapeDtypeStruct((CLIENTS, BATCH, size, size, 3), "float32")
    return jax.eval_shape(algorithm.init, jax.random.key(0)), Views(view, view)


def dtypes(tree: Any) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}


def products(jaxpr: core.Jaxpr, name: str) -> list[tuple[set[str], str]]:
    """Dtypes of the factors and of the result, for each primitive of this name, called ones included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == name:
            factors = {str(var.aval.dtype) for var in eqn.invars}
            found.append((factors, str(eqn.outvars[0].aval.dtype)))
        for inner in core.jaxprs_in_params(eqn.params):
            found += products(inner, name)
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_multiply_in_bfloat16_and_keep_float32(network: str) -> None:
    """Every convolution of forward and backward pass; of the matmuls all but the head's."""
    settings = {"image_size": SIZE} | NETWORKS[network]
    model, algorithm = build("bfloat16", **settings, convolutions=PLAIN)
    state, views = shapes(algorithm, settings["image_size"])
    wanted = {"float32", "int32"}
    assert dtypes(state) == wanted
    new, info = jax.eval_shape(algorithm.step, state, views)
    assert dtypes(new) == wanted
    assert dtypes((info.loss, info.top1)) == {"float32"}
    assert dtypes((info.smashed, info.smashed_grad)) == {"bfloat16"}
    features = jax.eval_shape(algorithm.encode, state, views_of_one(views))
    assert dtypes(features) == {"float32"}
    jaxpr = jax.make_jaxpr(algorithm.step)(state, views).jaxpr
    convolutions = products(jaxpr, "conv_general_dilated")
    assert convolutions and all(p == ({"bfloat16"}, "bfloat16") for p in convolutions)
    client_params = jax.eval_shape(model.init, jax.random.key(0))[0]
    client = jax.make_jaxpr(model.client)(client_params, views_of_one(views)).jaxpr
    assert all(p == ({"bfloat16"}, "bfloat16") for p in products(client, "dot_general"))


def views_of_one(views: Views) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(views.query.shape[1:], views.query.dtype)


def test_only_head_and_contrast_multiply_in_float32() -> None:
    """With clients and server in the form of matmuls: those in float32 are as many as without a body."""
    model, algorithm = build("bfloat16")
    state, views = shapes(algorithm, SIZE)
    found = products(jax.make_jaxpr(algorithm.step)(state, views).jaxpr, "dot_general")
    exact = [p for p in found if p != ({"bfloat16"}, "bfloat16")]
    # Momentum head: 2. Online head: 2, and 2 gradients each. Each direction: query times queue, and back.
    assert exact == [({"float32"}, "float32")] * (2 + 2 * 3 + 2 * 2)
    assert len(found) > len(exact)


def test_fl_moco_and_queues_per_client_keep_float32() -> None:
    model, _ = build("bfloat16", cut_layer=1, bottleneck=None, stacked_server=True)
    for algorithm in (
        flmoco(model, num_clients=CLIENTS, queue_size=16),
        mocosfl(model, num_clients=CLIENTS, queue_size=48, feature_sharing=False),
    ):
        state, views = shapes(algorithm, SIZE)
        new, info = jax.eval_shape(algorithm.step, state, views)
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
        assert info.loss.dtype == jnp.float32


def trained(compute_dtype: str, lr: float = 0.01) -> tuple[TrainState, TrainState, np.ndarray]:
    """First and last state, and the losses, of `STEPS` steps with FedAvg after every fifth."""
    _, algorithm = build(compute_dtype, lr=lr)
    step, sync = jax.jit(algorithm.step), jax.jit(algorithm.sync)
    first = state = jax.jit(algorithm.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, CLIENTS, BATCH, SIZE, SIZE, 3))
    losses = []
    for i in range(STEPS):
        noise = rng.normal(scale=0.3, size=(2, *images.shape[1:]))
        views = Views(*(jnp.asarray(images[i % 12] + n, jnp.float32) for n in noise))
        state, info = step(state, views)
        losses.append(float(info.loss))
        if i % 5 == 4:
            state, _ = sync(state)
    return first, state, np.array(losses)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
