"""Clients enter from the pool and leave for it: what each has of its own, and what all share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mocosfl_jax import Algorithm, CohortState, MomentumContrast, SplitModel, TrainState, Views, mocosfl
from mocosfl_jax.algorithm.clients import Sync
from mocosfl_jax.algorithm.interface import Models
from tests.support.algorithms import B, Build, N, assert_trees_close, client, diverse
from tests.support.toy import IMAGE, random_views

PARTS = ("params", "key_params", "opt_state")
# How clients are synchronized, and what each then has of its own.
OWN = [
    (Sync(), {"key_params", "opt_state"}),
    (Sync(momentum_models=True), {"opt_state"}),
    (Sync(buffers="reset"), {"key_params"}),
    (Sync(momentum_models=True, buffers="average"), set()),
    (Sync(momentum_models=True, buffers="reset"), set()),
    (Sync(divergence_lambda=0.1), {"params", "key_params", "opt_state"}),
]
COHORT = [3, 1]


def trained(algorithm: Algorithm, at_rest: TrainState, seed: int) -> CohortState:
    """A cohort after two steps and a synchronization."""
    state = algorithm.enter(at_rest, jnp.array(COHORT))
    for step in range(2):
        state, _ = algorithm.step(state, random_views(seed + step, len(COHORT), B))
    return algorithm.sync(state)[0]


@pytest.mark.parametrize("sync, own", OWN)
def test_the_pool_keeps_one_of_what_all_clients_share(
    build: Build, toy_model: SplitModel, sync: Sync, own: set[str]
) -> None:
    """Everyone who enters next has what a pool of N whole clients would give them."""
    algorithm, state = build(toy_model, sync=sync)
    at_rest = algorithm.leave(algorithm.sync(diverse(state))[0])
    everyone = algorithm.enter(at_rest).clients
    members = trained(algorithm, at_rest, 1)
    left = algorithm.leave(members)
    after = algorithm.enter(left).clients
    for part in PARTS:
        before, now, of_members = (getattr(c, part) for c in (everyone, after, members.clients))
        shapes = {leaf.shape for leaf in jax.tree.leaves(getattr(left.pool.own, part))}
        assert bool(shapes) == (part in own) and all(shape[0] == N for shape in shapes)
        assert_trees_close(client(now, jnp.array(COHORT)), of_members, rtol=0)
        others = client(now, jnp.array([0, 2]))
        if part not in own:  # synchronized: the others have received it too
            assert_trees_close(others, of_members, rtol=0)
        elif part != "params":
            assert_trees_close(others, client(before, jnp.array([0, 2])), rtol=0)


def test_a_stateless_pool_does_not_grow_with_its_clients(build: Build, toy_model: SplitModel) -> None:
    def size(num_clients: int, sync: Sync) -> int:
        algorithm, _ = build(toy_model, num_clients=4, sync=sync)
        del algorithm
        state = jax.eval_shape(
            build(toy_model, num_clients=num_clients, sync=sync)[0].init, jax.random.key(0)
        )
        return sum(leaf.size for leaf in jax.tree.leaves(state.pool))

    stateless = Sync(momentum_models=True, buffers="average")
    kernel = 3 * 5
    assert size(4, stateless) == size(40, stateless) == 3 * kernel  # online, momentum model, buffer
    assert size(40, Sync()) == kernel + 40 * 2 * kernel


@pytest.mark.parametrize("sync", [Sync(), Sync(momentum_models=True, buffers="average")])
def test_leaving_and_entering_changes_no_bit_after_a_synchronization(
    build: Build, toy_model: SplitModel, sync: Sync
) -> None:
    """So a run may be saved and resumed after any round."""
    algorithm, state = build(toy_model, sync=sync)
    members = trained(algorithm, algorithm.leave(state), 3)
    again = algorithm.enter(algorithm.leave(members), jnp.array(COHORT))
    assert_trees_close(again._replace(pool=None), members._replace(pool=None), rtol=0)


def test_a_cohort_that_leaves_unsynchronized_is_averaged(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    state = diverse(state)
    left = algorithm.leave(state)
    for leaf, mean in zip(
        jax.tree.leaves(state.clients.params), jax.tree.leaves(left.pool.shared.params), strict=True
    ):
        np.testing.assert_allclose(mean, np.mean(leaf, axis=0), rtol=1e-5, atol=1e-6)


def test_frozen_clients_share_everything(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model, client_optimizer=None)
    left = algorithm.leave(algorithm.step(state, random_views(1, N, B))[0])
    assert not jax.tree.leaves(left.pool.own)
    expected: Any = jax.tree.map(lambda leaf: leaf[0], state.clients.params)
    assert_trees_close(left.pool.shared.params, expected, rtol=0)


def test_a_step_does_not_touch_the_pool(build: Build, toy_model: SplitModel) -> None:
    """The traced step returns the pool that it gets, and no operation has it as an operand."""
    algorithm, state = build(toy_model)
    entered = algorithm.enter(algorithm.leave(state), jnp.array(COHORT))
    views = random_views(1, len(COHORT), B)
    jaxpr = jax.make_jaxpr(lambda pool: algorithm.step(entered._replace(pool=pool), views))(
        entered.pool
    ).jaxpr
    (call,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "jit"]
    inner = call.params["jaxpr"].jaxpr
    pool = [inner.invars[call.invars.index(var)] for var in jaxpr.invars]
    assert len(pool) == len(jax.tree.leaves(entered.pool)) > 0
    assert not any(var in equation.invars for equation in inner.eqns for var in pool)


def test_only_a_state_at_rest_is_entered_and_encoded(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    with pytest.raises(TypeError, match="found CohortState, allowed: TrainState"):
        algorithm.enter(state)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="found CohortState, allowed: TrainState"):
        algorithm.encode(state, random_views(4, 1, 5).query[0])  # type: ignore[arg-type]


def test_only_a_cohort_that_has_entered_works(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    at_rest: Any = algorithm.leave(state)
    works: list[Callable[[], Any]] = [
        lambda: algorithm.step(at_rest, random_views(1, N, B)),
        lambda: algorithm.sync(at_rest),
        lambda: algorithm.leave(at_rest),
    ]
    for work in works:
        with pytest.raises(TypeError, match="state: found TrainState, allowed: CohortState, from `enter`"):
            work()


def test_images_that_were_not_normalised_are_refused(build: Build, toy_model: SplitModel) -> None:
    algorithm, state = build(toy_model)
    raw = jnp.ones((N, B, *IMAGE), jnp.uint8)
    with pytest.raises(ValueError, match="views: found uint8, allowed: floats, from `two_views`"):
        algorithm.step(state, Views(raw, raw))
    with pytest.raises(ValueError, match="images: found uint8, allowed: floats, from `normalise`"):
        algorithm.encode(algorithm.leave(state), raw[0])


def test_the_arrays_of_given_models_stay_when_steps_donate_theirs(toy_model: SplitModel) -> None:
    """Also if `init`, `enter` and `sync` run without a jit, in which they would share arrays."""
    algorithm = mocosfl(
        toy_model,
        num_clients=N,
        moco=MomentumContrast(queue_size=48),
        client_loss=lambda params, anchor: jnp.sum((params["kernel"] - anchor["kernel"]) ** 2),
    )
    rng = jax.random.key(0)
    given = toy_model.init(rng)
    before = jax.tree.map(np.array, given)
    step = jax.jit(algorithm.step, donate_argnums=0)
    state = algorithm.enter(algorithm.init(rng, Models(given, given)))
    for seed in (1, 2):
        state, _ = step(state, random_views(seed, N, B))
        state, _ = algorithm.sync(state)
    jax.tree.map(np.testing.assert_array_equal, given, before)


@pytest.mark.parametrize("buffers", ["keep", "reset", "average"])
def test_an_optimizer_that_counts_its_steps(build: Build, toy_model: SplitModel, buffers: str) -> None:
    """Each client has its own Adam, as when it trains alone, and whole numbers stay whole."""
    adam = optax.adam(0.1)
    algorithm, state = build(toy_model, sync=Sync(buffers=buffers), client_optimizer=adam)
    state = diverse(state)
    state = state._replace(
        clients=state.clients._replace(opt_state=jax.vmap(adam.init)(state.clients.params))
    )
    new, info = algorithm.step(state, random_views(1, N, B))
    assert info.smashed_grad is not None
    grads = info.smashed_grad.reshape(N, B, 4, 4, 5)
    for i, images in enumerate(random_views(1, N, B).query):
        own = client(state.clients.params, i)
        _, pullback = jax.vjp(lambda params, images=images: toy_model.client(params, images), own)
        updates, _ = adam.update(pullback(grads[i])[0], adam.init(own))
        expected = optax.apply_updates(own, updates)
        assert_trees_close(client(new.clients.params, i), expected, rtol=1e-4, atol=1e-5)
    again = algorithm.enter(algorithm.leave(algorithm.sync(new)[0]))
    dtypes = [jax.tree.map(lambda leaf: leaf.dtype, s.clients) for s in (state, again)]
    assert dtypes[0] == dtypes[1]
    counts = {"keep": 1, "reset": 0, "average": 1}
    np.testing.assert_array_equal(again.clients.opt_state[0].count, np.full(N, counts[buffers]))


@pytest.mark.parametrize("buffers", ["reset", "average"])
@pytest.mark.parametrize("kind", ["with a rate in its state", "with a truth value in its state"])
def test_an_optimizer_whose_state_is_not_zeros(
    build: Build, toy_model: SplitModel, buffers: str, kind: str
) -> None:
    """A reset gives the optimizer's first state; zeros would be a learning rate of zero."""
    inner = optax.sgd(0.1)
    optimizer = (
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
        if kind == "with a rate in its state"
        else optax.apply_if_finite(inner, 3)
    )
    algorithm, state = build(
        toy_model, sync=Sync(buffers=buffers, momentum_models=True), client_optimizer=optimizer
    )
    new = algorithm.sync(algorithm.step(diverse_models(state), random_views(1, N, B))[0])[0]
    again = algorithm.enter(algorithm.leave(new))
    start = optimizer.init(client(state.clients.params, 0))
    for i in range(N):
        of_client = client(again.clients.opt_state, i)
        if buffers == "reset":
            assert_trees_close(of_client, start, rtol=0)
        assert jax.tree.map(lambda leaf: leaf.dtype, of_client) == jax.tree.map(lambda x: x.dtype, start)
    moved, _ = algorithm.step(again, random_views(2, N, B))
    before, after = (jax.tree.leaves(each.clients.params)[0] for each in (again, moved))
    assert np.any(before != after)


def diverse_models(state: CohortState) -> CohortState:
    """As `diverse`, but each client has the optimizer state that it started with."""
    return diverse(state)._replace(clients=diverse(state).clients._replace(opt_state=state.clients.opt_state))
