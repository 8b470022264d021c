"""The algorithm on a toy network against loops, end-to-end gradients and statements of the paper."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import SplitModel, Views
from mocosfl_jax.algorithm import moco, optim
from mocosfl_jax.algorithm.concatenation import merge
from tests.support.algorithms import LR, B, Build, K, N, assert_trees_close, client, diverse
from tests.support.toy import random_views


def test_all_start_from_the_same_weights(build: Build, toy_model: SplitModel) -> None:
    _, state = build(toy_model)
    for i in range(N):
        assert_trees_close(client(state.clients.params, i), client(state.clients.params, 0), rtol=0)
    assert_trees_close(state.clients.key_params, state.clients.params, rtol=0)
    assert_trees_close(state.server.key_params, state.server.params, rtol=0)
    assert all(not np.any(m) for m in jax.tree.leaves(state.server.opt_state))


@pytest.mark.parametrize("symmetric", [True, False])
def test_step_equals_a_loop_over_clients_with_end_to_end_gradients(
    build: Build, toy_model: SplitModel, symmetric: bool, x64: None
) -> None:
    """One reference step without vmap or a split: one gradient through client and server together."""
    algorithm, state = build(toy_model, symmetric=symmetric)
    state = diverse(jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, state))
    views = Views(*(x.astype(float) for x in random_views(1, N, B)))
    new, info = algorithm.step(state, views)

    tau = 0.99

    def blend(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: tau * a + (1 - tau) * b, old, new)

    online = [client(state.clients.params, i) for i in range(N)]
    momentum = [blend(client(state.clients.key_params, i), online[i]) for i in range(N)]
    server_momentum = blend(state.server.key_params, state.server.params)

    def embed(params: Any, smashed: jax.Array) -> jax.Array:
        z = toy_model.server(params, smashed).projection
        return z / jnp.linalg.norm(z, axis=1, keepdims=True)

    def smash(models: list[Any], images: jax.Array) -> jax.Array:
        return jnp.concatenate([toy_model.client(models[i], images[i]) for i in range(N)])

    key_smashed = smash(momentum, views.key)
    k2 = embed(server_momentum, key_smashed)
    k1 = embed(server_momentum, smash(online, views.query))

    def info_nce(q: jax.Array, k: jax.Array) -> jax.Array:
        logits = jnp.concatenate(
            [jnp.sum(q * k, axis=1, keepdims=True), q @ state.server.queue.keys.T], axis=1
        )
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    def loss(client_params: list[Any], server_params: Any) -> jax.Array:
        total = info_nce(embed(server_params, smash(client_params, views.query)), k2)
        if symmetric:
            total += info_nce(embed(server_params, key_smashed), k1)
        return total

    value, (client_grads, server_grads) = jax.value_and_grad(loss, (0, 1))(online, state.server.params)
    np.testing.assert_allclose(info.loss, value, rtol=1e-12)

    # The server's buffers start at zero; the diverse clients' buffers do not.
    expected = jax.tree.map(lambda p, g: p - LR * (g + 5e-4 * p), state.server.params, server_grads)
    assert_trees_close(new.server.params, expected, rtol=1e-9, atol=1e-12)
    assert_trees_close(new.server.key_params, server_momentum, rtol=1e-12)
    buffers = jax.tree.leaves(state.clients.opt_state)
    for i in range(N):
        assert_trees_close(client(new.clients.key_params, i), momentum[i], rtol=1e-12)
        expected = jax.tree.map(
            lambda p, g, m, i=i: p - LR * (0.9 * m[i] + g + 5e-4 * p),
            online[i],
            client_grads[i],
            jax.tree.unflatten(jax.tree.structure(online[i]), buffers),
        )
        assert_trees_close(client(new.clients.params, i), expected, rtol=1e-9, atol=1e-12)
    keys = jnp.concatenate([k1, k2]) if symmetric else k2
    expected_queue = moco.enqueue(state.server.queue, keys)
    assert_trees_close(new.server.queue, expected_queue, rtol=1e-10, atol=1e-12)
    assert new.step == 1


def test_loss_does_not_depend_on_the_order_of_clients(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    state, views = diverse(state), random_views(2, N, B)
    order = jnp.array([2, 0, 3, 1])
    shuffled = state._replace(clients=client(state.clients, order))
    _, info = algorithm.step(state, views)
    _, permuted = algorithm.step(shuffled, Views(*(x[order] for x in views)))
    np.testing.assert_allclose(permuted.loss, info.loss, rtol=1e-6)
    assert info.smashed_grad is not None
    pieces = info.smashed_grad.reshape(N, B, 4, 4, 5)[order]
    assert permuted.smashed_grad is not None
    np.testing.assert_allclose(permuted.smashed_grad, merge(pieces), rtol=1e-4, atol=1e-7)


def test_a_cohort_trains_like_a_separate_pool_and_others_stay(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    at_rest, cohort = algorithm.leave(diverse(state)), jnp.array([3, 1])
    everyone = algorithm.enter(at_rest).clients
    views = random_views(3, 2, B)
    new, info = algorithm.step(algorithm.enter(at_rest, cohort), views)
    pair, alone = build(toy_model, num_clients=2)
    alone = alone._replace(clients=client(everyone, cohort), server=at_rest.server)
    expected, expected_info = pair.step(alone, views)
    assert_trees_close(new.clients, expected.clients, rtol=1e-6, atol=1e-7)
    assert_trees_close(new.server, expected.server, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(info.loss, expected_info.loss, rtol=1e-6)
    after = algorithm.enter(algorithm.leave(new)).clients
    idle = jnp.array([0, 2])
    for kept in ("key_params", "opt_state"):
        before, now = getattr(everyone, kept), getattr(after, kept)
        assert_trees_close(client(now, idle), client(before, idle), rtol=0)
        assert_trees_close(client(now, cohort), getattr(new.clients, kept), rtol=0)


def test_sync_averages_the_cohort_and_loads_the_mean_into_all(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    state = diverse(algorithm.enter(algorithm.leave(state), jnp.array([1, 2])))
    synced, _ = algorithm.sync(state)
    everyone = algorithm.enter(algorithm.leave(synced)).clients.params
    for leaf, mean, after in zip(
        *map(jax.tree.leaves, (state.clients.params, synced.clients.params, everyone)), strict=True
    ):
        np.testing.assert_allclose(mean, np.broadcast_to(leaf.mean(axis=0), leaf.shape), rtol=1e-6)
        np.testing.assert_array_equal(after, np.broadcast_to(mean[0], (N, *leaf.shape[1:])))
    others, before = (s._replace(clients=s.clients._replace(params=None)) for s in (synced, state))
    assert_trees_close(others, before, rtol=0)


def test_sync_of_equal_clients_changes_nothing(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    synced, info = algorithm.sync(state)
    assert_trees_close(synced, state, rtol=1e-6)
    np.testing.assert_allclose(info.divergence, np.zeros(N), atol=1e-6)


def test_encode_is_the_average_client_and_the_server(build: Build, toy_model: SplitModel, x64: None) -> None:
    algorithm, state = build(toy_model)
    state, _ = algorithm.sync(diverse(state))
    images = random_views(4, 1, 5).query[0]
    got = algorithm.encode(algorithm.leave(state), images)
    expected = toy_model.server(
        state.server.params, toy_model.client(client(state.clients.params, 0), images)
    )
    assert_trees_close(got, expected, rtol=1e-6)


def test_learning_rates_follow_their_schedules(build: Build, toy_model: SplitModel) -> None:
    """Rates are zero from step 1 on: the weights stay, while momentum models and the queue still change."""

    def stopping(step: jax.Array) -> jax.Array:
        return jnp.where(step < 1, LR, 0.0)

    optimizer = optim.sgd(stopping)
    algorithm, state = build(toy_model, client_optimizer=optimizer, server_optimizer=optimizer)
    first, _ = algorithm.step(state, random_views(5, N, B))
    second, _ = algorithm.step(first, random_views(6, N, B))
    assert np.any(jax.tree.leaves(first.server.params)[0] != jax.tree.leaves(state.server.params)[0])
    assert_trees_close(second.server.params, first.server.params, rtol=0)
    assert_trees_close(second.clients.params, first.clients.params, rtol=0)
    assert np.any(second.server.queue.keys != first.server.queue.keys)


def test_incompatible_settings_are_refused(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    with pytest.raises(ValueError, match=r"views: found query .* with M = 4"):
        algorithm.step(state, random_views(1, N - 1, B))
    with pytest.raises(ValueError, match=r"views: found query .* with M = 2"):
        algorithm.step(algorithm.enter(algorithm.leave(state), jnp.array([0, 1])), random_views(1, N, B))
    small, state = build(toy_model, queue_size=N * B - 1)
    with pytest.raises(ValueError, match=r"moco\.queue_size: found a queue of 11 keys, allowed: 12 or more"):
        small.step(state, random_views(1, N, B))
    small, state = build(toy_model, queue_size=N * B - 1, feature_sharing=False)
    with pytest.raises(
        ValueError, match=r"found 11, 2 for each of 4 clients, allowed: 12 or more, 3 for each"
    ):
        small.step(state, random_views(1, N, B))
    with pytest.raises(ValueError, match=r"moco\.queue_size: found 3, allowed: 4 or more"):
        build(toy_model, queue_size=3, feature_sharing=False)


def test_training_lowers_the_loss_of_the_same_views(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model, temperature=0.5)
    step, views, losses = jax.jit(algorithm.step), random_views(7, N, B), []
    for i in range(60):
        state, info = step(state, views)
        losses.append(float(info.loss))
        if i % 5 == 4:
            state, _ = algorithm.sync(state)
    # The queue soon holds keys of these same views, so the loss has a lower bound: compare once it is full.
    assert losses[-1] < losses[K // (2 * N * B) + 1] - 0.05
