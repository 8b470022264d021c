"""MocoSFL without vector concatenation, against a loop that gives the server one client after another."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import SplitModel, Views
from mocosfl_jax.algorithm import moco, optim
from mocosfl_jax.algorithm.adversary import Adversary
from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.errors import UserError
from tests.support.algorithms import LR, B, Build, K, N, assert_trees_close, client, diverse, in_float64
from tests.support.toy import random_views

OPTIONS: list[dict[str, Any]] = [
    {},
    {"symmetric": False},
    {"feature_sharing": False},
    {"full_symmetric": True},
]


def falling(step: jax.Array) -> jax.Array:
    return LR / (1 + step)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_is_one_step_of_the_server_for_each_client(
    build: Build, toy_model: SplitModel, options: dict[str, Any], x64: None
) -> None:
    """Against MocoSFL of a single client, on the server as the client before has left it.

    All of these steps have the learning rate of the same training step, here of the eighth.
    """
    rates = {"client_optimizer": optim.sgd(falling), "server_optimizer": optim.sgd(falling)}
    algorithm, state = build(toy_model, concatenate=False, **options, **rates)
    own_queues = not options.get("feature_sharing", True)
    size = K // N if own_queues else K
    alone, _ = build(
        toy_model, num_clients=1, **options | {"feature_sharing": True, "queue_size": size}, **rates
    )

    cohort = [1, 3, 2]
    state = algorithm.enter(algorithm.leave(diverse(state)), jnp.array(cohort))
    state = in_float64(state)._replace(step=jnp.array(7))
    views = Views(*in_float64(random_views(1, len(cohort), B)))
    new, info = algorithm.step(state, views)

    at_server: Any = state.server
    losses: list[Any] = []
    smashed_grads: list[Any] = []
    members: list[Any] = []
    for place in range(len(cohort)):
        queue = client(state.clients.queue, place) if own_queues else at_server.queue
        single = state._replace(
            clients=client(state.clients, jnp.array([place]))._replace(queue=None),
            server=at_server._replace(queue=queue),
            cohort=None,
            pool=None,
        )
        single, of_client = alone.step(single, Views(*(x[place : place + 1] for x in views)))
        losses.append(of_client.loss)
        smashed_grads.append(of_client.smashed_grad)
        own = single.server.queue if own_queues else None
        members.append(client(single.clients, 0)._replace(queue=own))
        at_server = single.server._replace(queue=None) if own_queues else single.server

    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-9)
    assert info.smashed_grad is not None
    np.testing.assert_allclose(info.smashed_grad, np.concatenate(smashed_grads), rtol=1e-8, atol=1e-12)
    assert_trees_close(new.server, at_server, rtol=1e-8, atol=1e-12)
    for place, member in enumerate(members):
        assert_trees_close(client(new.clients, place), member, rtol=1e-8, atol=1e-12)
    assert new.step == 8


@pytest.mark.parametrize("options", OPTIONS)
def test_a_single_client_has_nothing_to_concatenate(
    build: Build, toy_model: SplitModel, options: dict[str, Any]
) -> None:
    one_by_one, state = build(toy_model, num_clients=1, concatenate=False, **options)
    at_once, _ = build(toy_model, num_clients=1, **options)
    state, views = diverse(state), random_views(2, 1, B)
    assert_trees_close(one_by_one.step(state, views), at_once.step(state, views), rtol=1e-5, atol=1e-6)


def test_two_clients_are_two_steps_and_not_one(build: Build, toy_model: SplitModel) -> None:
    """The second client meets a server that has learnt from the first, and finds its keys in the queue."""
    one_by_one, state = build(toy_model, num_clients=2, concatenate=False, symmetric=False)
    at_once, _ = build(toy_model, num_clients=2, symmetric=False)
    views = random_views(2, 2, B)
    apart, together = (algorithm.step(state, views)[0].server for algorithm in (one_by_one, at_once))
    assert int(apart.queue.cursor) == int(together.queue.cursor) == 2 * B
    keys = apart.queue.keys[: 2 * B], together.queue.keys[: 2 * B]
    np.testing.assert_allclose(keys[0][:B], keys[1][:B], rtol=1e-5, atol=1e-6)
    assert np.abs(keys[0][B:] - keys[1][B:]).max() > 1e-5
    moved = [np.abs(new.params["kernel"] - state.server.params["kernel"]).sum() for new in (apart, together)]
    assert moved[0] > 1.2 * moved[1]


def test_a_queue_needs_room_for_one_client(build: Build, toy_model: SplitModel) -> None:
    small, state = build(toy_model, concatenate=False, queue_size=B)
    assert np.isfinite(small.step(state, random_views(1, N, B))[1].loss)
    smaller, state = build(toy_model, concatenate=False, queue_size=B - 1)
    with pytest.raises(ValueError, match=r"moco\.queue_size: found a queue of 2 keys, allowed: 3 or more"):
        smaller.step(state, random_views(1, N, B))


def test_a_contrast_without_a_queue_needs_none(build: Build, toy_model: SplitModel) -> None:
    def contrast(params: Any, query: jax.Array, key: jax.Array, similarities: Any) -> moco.Contrast:
        return moco.Contrast(jnp.mean(jnp.square(query - key)), jnp.zeros(()))

    algorithm, state = build(toy_model, concatenate=False, queue_size=0, contrast=contrast)
    new, info = algorithm.step(state, random_views(1, N, B))
    assert new.server.queue is None and np.isfinite(info.loss)


@pytest.mark.parametrize("feature_sharing", [True, False])
def test_withheld_gradients_and_replay_are_the_servers_half(
    build: Build, toy_model: SplitModel, feature_sharing: bool
) -> None:
    algorithm, state = build(toy_model, concatenate=False, feature_sharing=feature_sharing)
    state = algorithm.enter(algorithm.leave(diverse(state)), jnp.array([1, 3]))
    full, info = algorithm.step(state, random_views(1, 2, B))
    assert algorithm.replay is not None and info.smashed is not None
    withheld, quiet = algorithm.replay.keep(state, random_views(1, 2, B))
    assert quiet.smashed_grad is None
    kept = SmashedData(*map(jnp.asarray, map(np.asarray, info.smashed)))
    replayed, again = algorithm.replay.train(state, kept)
    for other in (withheld, replayed):
        assert_trees_close(other.server, full.server, rtol=1e-5, atol=1e-7)
        assert_trees_close(other.clients.queue, full.clients.queue, rtol=1e-5, atol=1e-7)
        assert_trees_close(other.clients.params, state.clients.params, rtol=0)
    np.testing.assert_allclose(again.loss, info.loss, rtol=1e-6)


def test_frozen_clients_receive_nothing(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model, concatenate=False, client_optimizer=None)
    new, info = algorithm.step(state, random_views(1, N, B))
    assert info.smashed_grad is None
    assert_trees_close(new.clients.params, state.clients.params, rtol=0)


def test_what_has_no_meaning_without_concatenation_is_refused(build: Build, toy_model: SplitModel) -> None:
    adversary = Adversary(lambda rng: None, lambda state, *others: (state, others[0]))
    given: dict[str, Any] = {"batch_sizes": [3, 3, 1, 2], "adversary": adversary}
    for name, value in given.items():
        with pytest.raises(UserError, match=rf"^moco\.concatenate: found False with {name}, allowed: True$"):
            build(toy_model, concatenate=False, **{name: value})
