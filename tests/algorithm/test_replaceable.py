"""What may be replaced in MocoSFL: contrast, optimizers, clients' loss, average. And wrong settings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from mocosfl_jax import (
    Contrast,
    MomentumContrast,
    SplitModel,
    Sync,
    Views,
    flmoco,
    mocosfl,
    momentum_contrast,
)
from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.fedavg import average
from mocosfl_jax.errors import UserError
from tests.support.algorithms import LR, B, Build, N, assert_trees_close, client, diverse
from tests.support.toy import random_views


def test_a_contrast_without_a_queue(build: Build, toy_model: SplitModel) -> None:
    """The server's gradient is that of the replaced loss, written out for the whole batch."""
    seen: list[tuple[int, ...]] = []

    def distance(params: Any, query: Array, key: Array, similarities: Any) -> Contrast:
        seen.append(query.shape)
        return Contrast(jnp.mean(jnp.square(query - key)) * jnp.sum(params["head"]), jnp.ones(()))

    algorithm, state = build(toy_model, contrast=distance, queue_size=0, symmetric=False)
    assert state.server.queue is None and state.clients.queue is None
    views = random_views(1, N, B)
    new, info = algorithm.step(state, views)
    assert set(seen) == {(N * B, toy_model.key_dim)}

    smashed = info.smashed
    assert smashed is not None
    key = toy_model.server(state.server.key_params, smashed.key).projection

    def loss(params: Any) -> Array:
        query = toy_model.server(params, smashed.query).projection
        return jnp.mean(jnp.square(query - key)) * jnp.sum(params["head"])

    value, grads = jax.value_and_grad(loss)(state.server.params)
    np.testing.assert_allclose(info.loss, value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - LR * (g + 5e-4 * p), state.server.params, grads)
    assert_trees_close(new.server.params, expected, rtol=1e-4, atol=1e-6)


def test_a_contrast_may_use_the_queue(build: Build, toy_model: SplitModel) -> None:
    """The default contrast, given by hand, is the default."""
    plain, state = build(toy_model, temperature=0.3)
    given, _ = build(toy_model, contrast=momentum_contrast(0.3))
    views = random_views(1, N, B)
    assert_trees_close(given.step(state, views)[0], plain.step(state, views)[0], rtol=1e-6, atol=1e-7)
    without, start = build(toy_model, contrast=momentum_contrast(0.3), queue_size=0)
    with pytest.raises(ValueError, match=r"moco\.queue_size: found 0, allowed: 1 or more for a contrast"):
        without.step(start, views)


@pytest.mark.parametrize("optimizer", [optax.adam(0.01), optax.lars(0.1), optax.rmsprop(0.01)])
def test_the_server_takes_any_optimizer(
    build: Build, toy_model: SplitModel, optimizer: optax.GradientTransformation
) -> None:
    """Two steps: the gradients are those of SGD without momentum and decay at rate 1."""
    unit, start = build(toy_model, server_optimizer=optim.sgd(1.0, 0.0, 0.0), client_optimizer=None)
    algorithm, state = build(toy_model, server_optimizer=optimizer, client_optimizer=None)
    params, opt_state = state.server.params, optimizer.init(state.server.params)
    for seed in (1, 2):
        views = random_views(seed, N, B)
        same = start._replace(
            server=state.server._replace(opt_state=start.server.opt_state), clients=state.clients
        )
        moved, _ = unit.step(same, views)
        grads = jax.tree.map(lambda p, q: p - q, params, moved.server.params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, _ = algorithm.step(state, views)
        assert_trees_close(state.server.params, params, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("divergence_lambda", [None, 0.5])
def test_a_term_of_the_clients_loss(
    build: Build, toy_model: SplitModel, divergence_lambda: float | None
) -> None:
    """Its gradient is added, with the parameters that each client received in the last synchronization."""

    def proximal(params: Any, synchronized: Any) -> Array:
        return 3.0 * jnp.sum(jnp.square(params["kernel"] - synchronized["kernel"]))

    options: dict[str, Any] = {
        "client_optimizer": optim.sgd(LR, 0.0, 0.0),
        "sync": Sync(divergence_lambda=divergence_lambda),
    }
    plain, start = build(toy_model, **options)
    algorithm, state = build(toy_model, client_loss=proximal, **options)
    cohort = jnp.array([1, 3])
    state = algorithm.enter(algorithm.leave(state), cohort)
    start = plain.enter(plain.leave(start), cohort)
    anchor = state.clients.params["kernel"]
    for seed in (1, 2):
        views = random_views(seed, 2, B)
        same = start._replace(clients=state.clients._replace(anchor=None), server=state.server)
        expected, _ = plain.step(same, views)
        drift = state.clients.params["kernel"] - anchor
        state, _ = algorithm.step(state, views)
        np.testing.assert_allclose(
            state.clients.params["kernel"],
            expected.clients.params["kernel"] - LR * 6.0 * drift,
            rtol=1e-4,
            atol=1e-6,
        )
    assert np.any(drift != 0)
    state, _ = algorithm.sync(state)
    np.testing.assert_array_equal(state.clients.anchor["kernel"], state.clients.params["kernel"])
    assert algorithm.leave(state).pool.own.anchor is None


def mean_in_floats(stacked: Any, weights: Array | None) -> Any:
    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), stacked)


def test_any_average_of_the_stack(build: Build, toy_model: SplitModel) -> None:
    def median(stacked: Any, weights: Array | None) -> Any:
        return jax.tree.map(lambda leaf: jnp.median(leaf, axis=0), stacked)

    algorithm, state = build(toy_model, sync=Sync(average=median, momentum_models=True))
    state = diverse(state)
    synced, info = algorithm.sync(state)
    for name in ("params", "key_params"):
        kernels = np.asarray(getattr(state.clients, name)["kernel"])
        for i in range(N):
            got = client(getattr(synced.clients, name), i)["kernel"]
            np.testing.assert_allclose(got, np.median(kernels, axis=0), rtol=1e-6)
    middle = np.median(np.asarray(state.clients.params["kernel"]), axis=0)
    distances = [np.linalg.norm(k - middle) for k in np.asarray(state.clients.params["kernel"])]
    np.testing.assert_allclose(info.divergence, distances, rtol=1e-5)


@pytest.mark.parametrize("how", [{"average": mean_in_floats}, {"weights": np.array([1.0, 2.0, 3.0, 4.0])}])
def test_an_average_keeps_the_dtypes_of_optimizer_states(
    build: Build, toy_model: SplitModel, how: dict[str, Any]
) -> None:
    """Adam counts its steps in int32, and all clients have taken three."""
    sync = Sync(buffers="average", **how)
    algorithm, state = build(toy_model, client_optimizer=optax.adam(0.1), sync=sync)
    for seed in range(3):
        state, _ = algorithm.step(state, random_views(seed, N, B))
    synced, _ = algorithm.sync(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(synced), strict=True):
        assert new.dtype == old.dtype
    np.testing.assert_array_equal(synced.clients.opt_state[0].count, [3] * N)


def whole_stack(stacked: Any, weights: Array | None) -> Any:
    return stacked


def first_leaf(stacked: Any, weights: Array | None) -> Any:
    return jax.tree.leaves(stacked)[0][0]


@pytest.mark.parametrize(
    "average, message",
    [
        (
            whole_stack,
            r"sync\.average: found shape \(4, 3, 5\) at \['kernel'\], allowed: \(3, 5\)",
        ),
        (first_leaf, r"sync\.average: found a function that returns PyTreeDef\(\*\), allowed: one model"),
    ],
)
def test_an_average_that_is_no_model_is_refused(
    build: Build, toy_model: SplitModel, average: Any, message: str
) -> None:
    """The whole stack has the shapes of the clients' models: it would leave each client as it was."""
    algorithm, state = build(toy_model, sync=Sync(average=average))
    with pytest.raises(UserError, match=message):
        jax.jit(algorithm.sync)(state)


@pytest.mark.parametrize(
    "contrast, message",
    [
        (lambda p, q, k, s: jnp.mean(q * k), "contrast: found a function that returns an array, allowed: a"),
        (lambda p, q, k, s: (jnp.mean(q), 0.0), "contrast: found a function that returns a tuple, allowed"),
        (
            lambda p, q, k, s: Contrast(jnp.mean(q * k, 1), jnp.zeros(())),
            r"contrast: found a loss of shape \(12,\)",
        ),
        (lambda p, q, k, s: Contrast(jnp.mean(q * k), q), r"contrast: found a top1 of shape \(12, 8\)"),
    ],
)
def test_a_contrast_that_is_none_is_refused(
    build: Build, toy_model: SplitModel, contrast: Any, message: str
) -> None:
    algorithm, state = build(toy_model, contrast=contrast, queue_size=0)
    with pytest.raises(UserError, match=message):
        jax.jit(algorithm.step)(state, random_views(1, N, B))


def test_the_accuracy_of_a_contrast_may_be_a_plain_number(build: Build, toy_model: SplitModel) -> None:
    half: Any = 0.5
    algorithm, state = build(toy_model, contrast=lambda p, q, k, s: Contrast(jnp.mean(q * k), half))
    _, info = jax.jit(algorithm.step)(state, random_views(1, N, B))
    assert float(info.top1) == 0.5


@pytest.mark.parametrize(
    "client_loss, message",
    [
        (lambda params, synchronized: params["kernel"], r"client_loss: found an output of shape \(3, 5\)"),
        (lambda params, synchronized: params, "client_loss: found an output of dict, allowed: one number"),
    ],
)
def test_a_term_that_is_no_number_is_refused(
    build: Build, toy_model: SplitModel, client_loss: Any, message: str
) -> None:
    algorithm, state = build(toy_model, client_loss=client_loss)
    with pytest.raises(UserError, match=message):
        jax.jit(algorithm.step)(state, random_views(1, N, B))


def test_what_is_no_optimizer_is_refused(toy_model: SplitModel) -> None:
    def settings(name: str, optimizer: Any) -> dict[str, Any]:
        return {name: optimizer}

    for name in ("client_optimizer", "server_optimizer"):
        with pytest.raises(UserError, match=f"{name}: found 0.1, allowed: an Optax optimizer"):
            mocosfl(toy_model, num_clients=N, **settings(name, 0.1))
        with pytest.raises(UserError, match=f"{name}: found adam, allowed: an Optax optimizer"):
            mocosfl(toy_model, num_clients=N, **settings(name, optax.adam))
    with pytest.raises(UserError, match="optimizer: found adam, allowed: an Optax optimizer"):
        flmoco(toy_model, num_clients=N, **settings("optimizer", optax.adam))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sync": Sync(buffers="averge")}, "sync.buffers: found 'averge', allowed: keep, reset, average"),
        ({"sync": Sync(divergence_lambda=0.0)}, "sync.divergence_lambda: found 0.0, allowed: more than 0"),
        ({"sync": Sync(weights=np.ones(3))}, "sync.weights: found shape (3,), allowed: (4,)"),
        ({"sync": Sync(weights=-np.ones(4))}, "sync.weights: found negative"),
        ({"moco": MomentumContrast(temperature=-1.0)}, "moco.temperature: found -1.0, allowed: more than 0"),
        ({"moco": MomentumContrast(momentum=1.5)}, "moco.momentum: found 1.5, allowed: 0 to 1"),
        ({"moco": MomentumContrast(queue_size=0)}, "moco.queue_size: found 0, allowed: 1 or more"),
        ({"moco": MomentumContrast(queue_size=-3)}, "moco.queue_size: found -3, allowed: 0 or more"),
        ({"num_clients": 0}, "num_clients: found 0, allowed: 1 or more"),
        ({"batch_sizes": [1, 0]}, "batch_sizes: found [1, 0], allowed: 1 or more"),
        ({"batch_sizes": [1] * 5}, "batch_sizes: found [1, 1, 1, 1, 1], allowed: 1 or more"),
    ],
)
def test_wrong_settings_are_refused(toy_model: SplitModel, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        mocosfl(toy_model, **{"num_clients": 4} | settings)
    assert message in str(error.value)
    if "batch_sizes" not in settings:
        with pytest.raises(ValueError) as error:
            flmoco(toy_model, **{"num_clients": 4} | settings)
        assert message in str(error.value)


@pytest.mark.parametrize(
    "cohort, message",
    [
        ([0, 9], "cohort: found client 9, allowed: 0 to 3"),
        ([-1, 2], "cohort: found client -1, allowed: 0 to 3"),
        ([2, 2], "cohort: found a client twice"),
        ([[0, 1]], "cohort: found"),
        ([0.0, 1.0], "cohort: found"),
    ],
)
def test_a_cohort_of_other_clients_is_refused(toy_model: SplitModel, cohort: list, message: str) -> None:
    algorithm = mocosfl(toy_model, num_clients=N, moco=MomentumContrast(queue_size=48))
    state = algorithm.init(jax.random.key(0))
    with pytest.raises(ValueError) as error:
        algorithm.enter(state, np.array(cohort))
    assert message in str(error.value)
    with pytest.raises(ValueError) as error:
        algorithm.enter(state, cohort)
    assert message in str(error.value)


def test_a_cohort_may_be_a_list(toy_model: SplitModel) -> None:
    algorithm = mocosfl(toy_model, num_clients=N, moco=MomentumContrast(queue_size=48))
    state = algorithm.init(jax.random.key(0))
    expected = algorithm.enter(state, jnp.array([2, 0]))
    for cohort in ([2, 0], range(2, -1, -2)):
        for found in (
            algorithm.enter(state, cohort),
            jax.jit(lambda s, c=cohort: algorithm.enter(s, c))(state),
        ):
            jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_client_that_does_not_exist_is_seen_inside_a_jit(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    entered = algorithm.enter(algorithm.leave(state), jnp.array([1, 9]))
    key_params = entered.clients.key_params["kernel"]
    assert np.isfinite(key_params[0]).all() and np.isnan(key_params[1]).all()
    _, info = algorithm.step(entered, random_views(1, 2, B))
    assert np.isnan(info.loss)


@pytest.mark.parametrize("views", [jnp.zeros((N, B, 4, 4, 3)), None, (1, 2)])
def test_images_that_are_no_views_are_refused(build: Build, toy_model: SplitModel, views: Any) -> None:
    algorithm = mocosfl(toy_model, num_clients=N, moco=MomentumContrast(queue_size=48))
    state = algorithm.enter(algorithm.init(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"views: found \w+, allowed: Views"):
        algorithm.step(state, views)
    flat = Views(jnp.zeros((N, 4, 4, 3)), jnp.zeros((N, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"views: found query \(4, 4, 4, 3\)"):
        algorithm.step(state, flat)


def test_models_give_the_mean_momentum_model_and_init_takes_them(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    at_rest = algorithm.leave(algorithm.sync(diverse(state))[0])
    models = algorithm.models(at_rest)
    assert_trees_close(models.momentum[0], average(at_rest.pool.own.key_params), rtol=1e-6)
    again = algorithm.models(algorithm.init(jax.random.key(3), models))
    assert_trees_close(again, models, rtol=1e-6)
