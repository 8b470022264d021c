"""Options of the algorithm on a toy network: queues per client, uneven batches, averaging, frozen clients."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import SplitModel, Views, mocosfl
from mocosfl_jax.algorithm import moco
from mocosfl_jax.algorithm.clients import Sync
from mocosfl_jax.algorithm.concatenation import merge, real_rows, split
from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.costs.flops import forward_flops
from tests.support.algorithms import B, Build, K, N, assert_trees_close, client, diverse, in_float64
from tests.support.toy import KEY_DIM, random_views

TAU = 0.99  # momentum coefficient, mocosfl's default


def test_concatenation_drops_the_padding_and_restores_it() -> None:
    real = real_rows([1, 3, 2])
    x = jnp.arange(18.0).reshape(3, 3, 2)
    expected = np.concatenate([x[0, :1], x[1, :3], x[2, :2]])
    np.testing.assert_array_equal(merge(x, real), expected)
    np.testing.assert_array_equal(split(merge(x, real), (3, 3), real), np.where(real[..., None], x, 0))
    np.testing.assert_array_equal(split(merge(x), (3, 3)), x)


# Queues per client.


def test_queues_per_client_equal_deques_under_sampling(build: Build, toy_model: SplitModel) -> None:
    """Each member of the cohort enqueues its own keys, queries' before keys'; no other queue changes."""
    algorithm, state = build(toy_model, feature_sharing=False)
    start = state.clients.queue
    assert start is not None and start.keys.shape == (N, K // N, KEY_DIM)
    assert state.server is not None and state.server.queue is None
    np.testing.assert_allclose(np.linalg.norm(start.keys, axis=-1), 1, rtol=1e-6)
    deques = [collections.deque(np.asarray(keys), maxlen=K // N) for keys in start.keys]
    at_rest = algorithm.leave(state)
    for t, cohort in enumerate(([0, 2], [2, 3], [0, 1], [0, 3], [0, 2])):
        views = random_views(t, 2, B)
        state = algorithm.enter(at_rest, jnp.array(cohort))
        online, momentum = state.clients.params, state.clients.key_params
        momentum = jax.tree.map(lambda a, b: TAU * a + (1 - TAU) * b, momentum, online)
        server_key = jax.tree.map(
            lambda a, b: TAU * a + (1 - TAU) * b, state.server.key_params, state.server.params
        )
        for place, i in enumerate(cohort):
            for params, images in ((online, views.query), (momentum, views.key)):
                smashed = toy_model.client(client(params, place), images[place])
                deques[i].extend(np.asarray(moco.normalise(toy_model.server(server_key, smashed).projection)))
        at_rest = algorithm.leave(algorithm.step(state, views)[0])
        queues = at_rest.pool.own.queue
        assert queues is not None
        for i in range(N):
            keys, cursor = queues.keys[i], int(queues.cursor[i])
            np.testing.assert_allclose(np.roll(keys, -cursor, axis=0), np.stack(deques[i]), atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_client_contrasts_only_with_its_own_queue(
    build: Build, toy_model: SplitModel, symmetric: bool, x64: None
) -> None:
    """The loss is the mean of the losses that each client has when trained alone with its queue."""
    algorithm, state = build(toy_model, feature_sharing=False, symmetric=symmetric)
    state, views = in_float64((diverse(state), random_views(1, N, B)))
    _, info = algorithm.step(state, views)
    losses = []
    for i in range(N):
        alone, _ = build(toy_model, num_clients=1, queue_size=K // N, symmetric=symmetric)
        own = state._replace(
            clients=client(state.clients, jnp.array([i]))._replace(queue=None),
            server=state.server._replace(queue=client(state.clients.queue, i)),
        )
        losses.append(alone.step(own, Views(*(x[i : i + 1] for x in views)))[1].loss)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-9)


# Uneven batches.


@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"feature_sharing": False}, {"full_symmetric": True}]
)
def test_padding_has_no_effect(
    build: Build, toy_model: SplitModel, options: dict[str, Any], x64: None
) -> None:
    """Different padding gives the same bits of loss, gradients, parameters and queue. nan would spread."""
    algorithm, state = build(toy_model, batch_sizes=[3, 3, 1, 2], **options)
    state, views = in_float64((diverse(state), random_views(1, N, 3)))
    real = real_rows([3, 3, 1, 2])[..., None, None, None]
    one = algorithm.step(state, views)
    other = algorithm.step(state, Views(*(jnp.where(real, x, 100 * jnp.cos(x)) for x in views)))
    assert_trees_close(one, other, rtol=0)
    if "full_symmetric" not in options:
        assert one[1].smashed is not None and len(one[1].smashed.query) == 9


def test_uneven_batches_equal_a_loop_over_clients(build: Build, toy_model: SplitModel, x64: None) -> None:
    """Against the gradient of the mean over all 9 rows, computed client by client."""
    sizes = [3, 3, 1, 2]
    algorithm, state = build(toy_model, batch_sizes=sizes, symmetric=False)
    state, views = in_float64((state, random_views(1, N, 3)))
    new, info = algorithm.step(state, views)

    def smash(params: list[Any], images: jax.Array) -> jax.Array:
        pieces = [toy_model.client(params[i], images[i, : sizes[i]]) for i in range(N)]
        return jnp.concatenate(pieces)

    online = [client(state.clients.params, i) for i in range(N)]
    # All momentum models start as copies of the online models.
    keys = moco.normalise(toy_model.server(state.server.params, smash(online, views.key)).projection)

    def loss(params: list[Any]) -> jax.Array:
        queries = moco.normalise(toy_model.server(state.server.params, smash(params, views.query)).projection)
        negatives = queries @ state.server.queue.keys.T
        logits = jnp.concatenate([jnp.sum(queries * keys, axis=1, keepdims=True), negatives], axis=1)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    value, grads = jax.value_and_grad(loss)(online)
    np.testing.assert_allclose(info.loss, value, rtol=1e-9)
    assert info.smashed is not None and len(info.smashed.key) == sum(sizes)
    for i in range(N):
        expected = jax.tree.map(lambda p, g: p - 0.1 * (g + 5e-4 * p), online[i], grads[i])
        assert_trees_close(client(new.clients.params, i), expected, rtol=1e-9, atol=1e-12)
    assert int(new.server.queue.cursor) == sum(sizes)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (1, 2)])
def test_views_of_other_batches_are_refused(toy_model: SplitModel, shape: tuple[int, int]) -> None:
    """With frozen clients, nothing else would notice that the wrong rows are taken for images."""
    algorithm = mocosfl(toy_model, num_clients=2, batch_sizes=[2, 1], client_optimizer=None)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    cohort = None if shape[0] == 2 else np.array([1])
    with pytest.raises(ValueError, match=rf"views: found {shape[0]} clients with batches of {shape[1]}, all"):
        algorithm.step(algorithm.enter(state, cohort), random_views(0, *shape))


def test_equal_batch_sizes_give_the_plain_step(build: Build, toy_model: SplitModel) -> None:
    plain, state = build(toy_model)
    named, _ = build(toy_model, batch_sizes=[B] * N)
    state, views = diverse(state), random_views(2, N, B)
    assert_trees_close(named.step(state, views), plain.step(state, views), rtol=1e-5, atol=1e-7)


# Symmetric loss on the clients' side.


def test_full_symmetric_is_the_gradient_of_both_views(build: Build, toy_model: SplitModel, x64: None) -> None:
    """Mean InfoNCE over 2 M B rows; gradients reach the clients from both views."""
    algorithm, state = build(toy_model, full_symmetric=True)
    state, views = in_float64((diverse(state), random_views(1, N, B)))
    new, info = algorithm.step(state, views)

    def blend(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: TAU * a + (1 - TAU) * b, old, new)

    online = [client(state.clients.params, i) for i in range(N)]
    momentum = [blend(client(state.clients.key_params, i), online[i]) for i in range(N)]
    server_momentum = blend(state.server.key_params, state.server.params)

    def embed(server: Any, models: list[Any], first: jax.Array, second: jax.Array) -> jax.Array:
        rows = [toy_model.client(models[i], x[i]) for i in range(N) for x in (first, second)]
        return moco.normalise(toy_model.server(server, jnp.concatenate(rows)).projection)

    keys = embed(server_momentum, momentum, views.key, views.query)

    def loss(models: list[Any]) -> jax.Array:
        queries = embed(state.server.params, models, views.query, views.key)
        negatives = queries @ state.server.queue.keys.T
        logits = jnp.concatenate([jnp.sum(queries * keys, axis=1, keepdims=True), negatives], axis=1)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0])

    value, grads = jax.value_and_grad(loss)(online)
    np.testing.assert_allclose(info.loss, value, rtol=1e-9)
    buffers = jax.tree.leaves(state.clients.opt_state)
    for i in range(N):
        expected = jax.tree.map(
            lambda p, g, m, i=i: p - 0.1 * (0.9 * m[i] + g + 5e-4 * p),
            online[i],
            grads[i],
            jax.tree.unflatten(jax.tree.structure(online[i]), buffers),
        )
        assert_trees_close(client(new.clients.params, i), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(new.server.queue.keys[: 2 * N * B], keys, rtol=1e-9, atol=1e-12)


# Frozen clients, withheld gradients and replay.


def test_frozen_clients_receive_no_gradient_and_never_change(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model, client_optimizer=None)
    new, info = algorithm.step(state, random_views(1, N, B))
    synced, _ = algorithm.sync(new)
    assert info.smashed_grad is None
    assert_trees_close(synced.clients.params, state.clients.params, rtol=0)
    assert_trees_close(synced.clients.opt_state, state.clients.opt_state, rtol=0)
    moving, start = build(toy_model)
    assert_trees_close(new.server, moving.step(start, random_views(1, N, B))[0].server, rtol=1e-5, atol=1e-7)


def test_frozen_clients_have_no_backward_pass(build: Build, toy_model: SplitModel) -> None:
    """A step has no gradient of the clients' kernels; once compiled, none of smashed data either."""

    def flops(**options: Any) -> tuple[int, float]:
        """FLOPs of the products in the traced algorithm, and of the whole compiled step."""
        algorithm, state = build(toy_model, **options)
        step, arguments = jax.jit(algorithm.step), (state, random_views(1, N, B))
        analysis = step.lower(*arguments).compile().cost_analysis()
        assert analysis is not None
        return forward_flops(step, *arguments), analysis["flops"]

    (frozen, compiled_frozen), (training, compiled_training) = flops(client_optimizer=None), flops()
    of_kernels = 2 * (N * B * 4 * 4) * (3 * 5)  # 16 pixels per image, 3 channels to 5
    of_smashed = 2 * (N * B) * (16 * 5) * 12
    # Twice as many where a backward pass recomputes the forward pass.
    assert training - frozen in (of_kernels, 2 * of_kernels)
    assert compiled_training - compiled_frozen > of_kernels + of_smashed


def test_withheld_gradients_train_the_server_alone(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    state, views = diverse(state), random_views(1, N, B)
    full, _ = algorithm.step(state, views)
    assert algorithm.replay is not None
    withheld, info = algorithm.replay.keep(state, views)
    assert info.smashed_grad is None
    assert_trees_close(withheld.server, full.server, rtol=1e-5, atol=1e-7)
    assert_trees_close(withheld.clients.params, state.clients.params, rtol=0)
    assert_trees_close(withheld.clients.key_params, full.clients.key_params, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("feature_sharing", [True, False])
def test_replay_is_the_servers_half_of_a_step(
    build: Build, toy_model: SplitModel, feature_sharing: bool
) -> None:
    algorithm, state = build(toy_model, feature_sharing=feature_sharing)
    state = algorithm.enter(algorithm.leave(diverse(state)), jnp.array([1, 3]))
    full, info = algorithm.step(state, random_views(1, 2, B))
    assert algorithm.replay is not None and info.smashed is not None
    kept = SmashedData(*map(jnp.asarray, map(np.asarray, info.smashed)))
    replayed, again = algorithm.replay.train(state, kept)
    assert_trees_close(replayed.server, full.server, rtol=1e-5, atol=1e-7)
    assert_trees_close(replayed.clients.queue, full.clients.queue, rtol=1e-5, atol=1e-7)
    models, before = (s.clients._replace(queue=None) for s in (replayed, state))
    assert_trees_close(models, before, rtol=0)
    np.testing.assert_allclose(again.loss, info.loss, rtol=1e-6)
    assert replayed.step == state.step + 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_clients_that_are_left_out_have_no_part_in_a_step(
    build: Build, toy_model: SplitModel, symmetric: bool
) -> None:
    """The server's half on the rows of two of three clients is that of a cohort of these two."""
    algorithm, state = build(toy_model, symmetric=symmetric)
    assert algorithm.replay is not None
    at_rest = algorithm.leave(diverse(state))
    two, three = (algorithm.enter(at_rest, jnp.array(cohort)) for cohort in ([0, 3], [0, 1, 3]))
    _, info = algorithm.step(two, random_views(1, 2, B))
    assert info.smashed is not None
    expected, alone = algorithm.replay.train(two, info.smashed)
    missing = jnp.full((B, *info.smashed.query.shape[1:]), 7.0)
    with_gap = SmashedData(*(jnp.concatenate([x[:B], missing, x[B:]]) for x in info.smashed))
    arrived = jnp.repeat(jnp.array([True, False, True]), B)
    found, among = algorithm.replay.train(three, with_gap, arrived)
    assert_trees_close(found.server, expected.server, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose((among.loss, among.top1), (alone.loss, alone.top1), rtol=1e-6)
    assert among.smashed_grad is not None and alone.smashed_grad is not None
    np.testing.assert_allclose(among.smashed_grad[arrived], alone.smashed_grad, rtol=1e-5, atol=1e-9)
    assert not among.smashed_grad[~arrived].any()


# Synchronization.


def stacked(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_weighted_average(build: Build, toy_model: SplitModel) -> None:
    weights = np.array([1.0, 2.0, 3.0, 10.0], np.float32)
    algorithm, state = build(toy_model, sync=Sync(weights=weights))
    cohort = [1, 3]
    state = diverse(algorithm.enter(algorithm.leave(state), jnp.array(cohort)))
    synced, _ = algorithm.sync(state)
    for leaf, mean in zip(stacked(state.clients.params), stacked(synced.clients.params), strict=True):
        expected = np.average(leaf, axis=0, weights=weights[cohort])
        np.testing.assert_allclose(mean, np.broadcast_to(expected, leaf.shape), rtol=1e-5, atol=1e-6)


def test_monacosfl_averages_the_momentum_models_too(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model, sync=Sync(momentum_models=True))
    state = diverse(algorithm.enter(algorithm.leave(state), jnp.array([0, 2])))
    synced, _ = algorithm.sync(state)
    for name in ("params", "key_params"):
        pairs = zip(
            stacked(getattr(state.clients, name)), stacked(getattr(synced.clients, name)), strict=True
        )
        for leaf, mean in pairs:
            expected = leaf.mean(axis=0)
            np.testing.assert_allclose(mean, np.broadcast_to(expected, leaf.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("buffers", ["keep", "reset", "average"])
def test_buffers_are_kept_reset_or_averaged(build: Build, toy_model: SplitModel, buffers: str) -> None:
    algorithm, state = build(toy_model, sync=Sync(buffers=buffers))
    state = diverse(algorithm.enter(algorithm.leave(state), jnp.array([0, 1, 3])))
    synced, _ = algorithm.sync(state)
    for leaf, new in zip(stacked(state.clients.opt_state), stacked(synced.clients.opt_state), strict=True):
        expected = {
            "keep": leaf,
            "reset": np.zeros_like(leaf),
            "average": np.broadcast_to(leaf.mean(axis=0), leaf.shape),
        }[buffers]
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)


def test_divergence_is_the_summed_distance_to_the_mean(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    state = diverse(algorithm.enter(algorithm.leave(state), jnp.array([3, 0])))
    _, info = algorithm.sync(state)
    expected = np.zeros(2)
    for leaf in stacked(state.clients.params):
        expected += [np.linalg.norm((own - leaf.mean(axis=0)).ravel()) for own in leaf]
    np.testing.assert_allclose(info.divergence, expected, rtol=1e-5)


@pytest.mark.parametrize("strength", [0.05, 100.0])
def test_divergence_aware_averaging_equals_its_definition(
    build: Build, toy_model: SplitModel, strength: float
) -> None:
    """Two rounds: the first sets each client's lambda, which is smaller where mu was clipped."""
    algorithm, state = build(toy_model, sync=Sync(divergence_lambda=strength))
    scales = np.zeros(N)
    for cohort in ([0, 1, 2], [1, 2, 3]):
        state = diverse(algorithm.enter(algorithm.leave(state), jnp.array(cohort)))
        synced, info = algorithm.sync(state)
        everyone = algorithm.enter(algorithm.leave(synced)).clients
        divergence = np.asarray(info.divergence)
        for place, i in enumerate(cohort):
            mu = min((scales[i] or strength) * divergence[place], 1.0)
            for leaf, new in zip(stacked(state.clients.params), stacked(everyone.params), strict=True):
                expected = mu * leaf[place] + (1 - mu) * leaf.mean(axis=0)
                np.testing.assert_allclose(new[i], expected, rtol=1e-4, atol=1e-5)
            scales[i] = scales[i] or mu / divergence[place]
        idle = ({0, 1, 2, 3} - set(cohort)).pop()
        for leaf, new in zip(stacked(state.clients.params), stacked(everyone.params), strict=True):
            np.testing.assert_allclose(new[idle], leaf.mean(axis=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(everyone.scales, scales, rtol=1e-5)
        state = algorithm.enter(algorithm.leave(synced))


# Everything on the server.


def test_without_client_layers_it_is_centralised_moco(build: Build, toy_model: SplitModel) -> None:
    """One client whose model is the identity: the server alone runs MoCo on the images."""

    def init(rng: jax.Array) -> tuple[Any, Any]:
        return {}, toy_model.init(rng)

    central = SplitModel(
        init,
        lambda params, images: images,
        toy_model.whole_backbone,
        lambda params, backbone: toy_model.head(params[1], backbone),
        toy_model.key_dim,
    )
    algorithm, state = build(central, num_clients=1)
    views = random_views(1, 1, 6)
    new, info = algorithm.step(state, views)
    synced, divergence = algorithm.sync(new)
    assert_trees_close(synced, new, rtol=0)
    assert divergence.divergence.shape == (1,)
    # The loss of its first step equals that of one MocoSFL client with the same weights.
    cut, cut_state = build(toy_model, num_clients=1)
    cut_state = cut_state._replace(
        clients=cut_state.clients._replace(
            params=jax.tree.map(lambda x: x[None], state.server.params[0]),
            key_params=jax.tree.map(lambda x: x[None], state.server.params[0]),
        ),
        server=cut_state.server._replace(
            params=state.server.params[1], key_params=state.server.params[1], queue=state.server.queue
        ),
    )
    _, expected = cut.step(cut_state, views)
    np.testing.assert_allclose(info.loss, expected.loss, rtol=1e-5)
