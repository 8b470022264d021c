"""FL-MoCo against centralised MoCo trained on each client separately."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import Forms, MomentumContrast, SplitModel, Views, flmoco, mocosfl, one_device
from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.clients import Sync
from mocosfl_jax.algorithm.moco import MoCoQueue
from tests.support.algorithms import assert_trees_close, client
from tests.support.toy import KEY_DIM, random_views

N, B, K = 3, 2, 12


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_client_equals_centralised_moco(toy_model: SplitModel, symmetric: bool, forms: Forms) -> None:
    """Three steps of clients 2 and 0, compared with a MocoSFL of one client that never synchronizes."""
    algorithm = flmoco(
        toy_model,
        num_clients=N,
        optimizer=optim.sgd(0.1),
        moco=MomentumContrast(queue_size=K, temperature=1.0, symmetric=symmetric),
        placement=one_device(forms),
    )
    at_rest = jax.jit(algorithm.init)(jax.random.key(0))
    start = algorithm.enter(at_rest).clients
    assert start.queue is not None and start.queue.keys.shape == (N, K, KEY_DIM)
    assert np.any(start.queue.keys[0] != start.queue.keys[1])
    state, step = algorithm.enter(at_rest, jnp.array([2, 0])), jax.jit(algorithm.step)
    alone = mocosfl(
        SplitModel(
            lambda rng: ({}, toy_model.init(rng)),
            lambda params, images: images,
            toy_model.whole_backbone,
            lambda params, backbone: toy_model.head(params[1], backbone),
            toy_model.key_dim,
        ),
        num_clients=1,
        server_optimizer=optim.sgd(0.1),
        moco=MomentumContrast(queue_size=K, temperature=1.0, symmetric=symmetric),
    )
    alone_step = jax.jit(alone.step)
    alone_start = alone.enter(jax.jit(alone.init)(jax.random.key(0)))
    assert alone_start.server is not None
    singles = {
        i: alone_start._replace(
            server=alone_start.server._replace(
                params=client(start.params, i),
                key_params=client(start.key_params, i),
                queue=MoCoQueue(start.queue.keys[i], start.queue.cursor[i]),
            )
        )
        for i in (2, 0)
    }
    for t in range(3):
        views = random_views(t, 2, B)
        state, info = step(state, views)
        losses = []
        for place, i in enumerate((2, 0)):
            images = Views(*(x[place : place + 1] for x in views))
            singles[i], single_info = alone_step(singles[i], images)
            losses.append(single_info.loss)
        np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-5)
        assert info.smashed is None and info.smashed_grad is None
    for place, single in enumerate(singles.values()):
        member = client(state.clients, place)
        assert_trees_close(member.params, single.server.params, rtol=1e-4, atol=1e-6)
        assert_trees_close(member.key_params, single.server.key_params, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(member.queue.keys, single.server.queue.keys, rtol=1e-4, atol=1e-6)
    own = algorithm.leave(state).pool.own
    untouched = start._replace(params=None)
    assert_trees_close(client(own, 1), client(untouched, 1), rtol=0)
    for place, i in enumerate((2, 0)):
        assert_trees_close(client(own, i), client(state.clients._replace(params=None), place), rtol=0)
    assert state.step == 3


def test_views_of_clients_outside_the_cohort_are_refused(toy_model: SplitModel) -> None:
    algorithm = flmoco(toy_model, num_clients=N, moco=MomentumContrast(queue_size=K))
    state = algorithm.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"views: found .* with M = 3"):
        algorithm.step(algorithm.enter(state), random_views(0, 2, 4))
    with pytest.raises(ValueError, match=r"views: found .* with M = 2"):
        algorithm.step(algorithm.enter(state, jnp.array([0, 1])), random_views(0, N, 4))


@pytest.mark.parametrize(
    "setting, found", [("full_symmetric", True), ("feature_sharing", False), ("concatenate", False)]
)
def test_settings_of_mocosfl_alone_are_refused(toy_model: SplitModel, setting: str, found: bool) -> None:
    moco = MomentumContrast(queue_size=K, **{setting: found})
    with pytest.raises(ValueError, match=f"moco.{setting}: found {found} for FL-MoCo, allowed: {not found}"):
        flmoco(toy_model, num_clients=N, moco=moco)


def test_sync_averages_whole_models(toy_model: SplitModel) -> None:
    algorithm = flmoco(
        toy_model, num_clients=N, moco=MomentumContrast(queue_size=K), sync=Sync(momentum_models=True)
    )
    state = algorithm.enter(jax.jit(algorithm.init)(jax.random.key(0)), jnp.array([1, 2]))
    noisy = jax.tree.map(
        lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), state.clients.params
    )
    state = state._replace(clients=state.clients._replace(params=noisy))
    synced, info = jax.jit(algorithm.sync)(state)
    for leaf, new in zip(jax.tree.leaves(noisy), jax.tree.leaves(synced.clients.params), strict=True):
        expected = np.broadcast_to(np.asarray(leaf).mean(axis=0), leaf.shape)
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)
    assert info.divergence.shape == (2,) and np.all(info.divergence > 0)
    assert_trees_close(synced.clients.queue, state.clients.queue, rtol=0)


def test_encode_is_the_first_clients_network(toy_model: SplitModel) -> None:
    algorithm = flmoco(toy_model, num_clients=N, moco=MomentumContrast(queue_size=K))
    state = algorithm.init(jax.random.key(0))
    images = random_views(4, 1, 5).query[0]
    params = client(algorithm.enter(state).clients.params, 0)
    expected = toy_model.server(params[1], toy_model.client(params[0], images))
    assert_trees_close(algorithm.encode(state, images), expected, rtol=1e-6)
    assert algorithm.replay is None
