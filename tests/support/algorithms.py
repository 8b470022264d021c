"""The compiled algorithm on the toy network, and comparisons of trees."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mocosfl_jax import Algorithm, CohortState, Forms, MomentumContrast, SplitModel, mocosfl, one_device
from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.interface import Replay
from mocosfl_jax.models.forms import ACCELERATOR, CPU

N, B, K = 4, 3, 48
LR = 0.1


# Both forms run on any platform and must give the same numbers.
FORMS = {"cpu": CPU, "accelerator": ACCELERATOR}


class Build(Protocol):
    """`build` in one of the `FORMS`."""

    def __call__(
        self, model: SplitModel, num_clients: int = N, **changes: Any
    ) -> tuple[Algorithm, CohortState]: ...


def in_float64(tree: Any) -> Any:
    """The tree, with its float32 arrays in float64, which has to be enabled."""
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def build(
    forms: Forms, model: SplitModel, num_clients: int = N, **changes: Any
) -> tuple[Algorithm, CohortState]:
    """Compile MocoSFL on `model`, and let all clients enter. `changes` go to MomentumContrast or mocosfl."""
    moco = {name: changes.pop(name) for name in MomentumContrast._fields if name in changes}
    pure = mocosfl(
        model,
        num_clients=num_clients,
        moco=MomentumContrast(**{"queue_size": K, "temperature": 1.0} | moco),
        placement=one_device(forms),
        **{"client_optimizer": optim.sgd(LR), "server_optimizer": optim.sgd(LR)} | changes,
    )
    algorithm = Algorithm(
        init=jax.jit(pure.init),
        enter=jax.jit(pure.enter),
        step=jax.jit(pure.step),
        sync=jax.jit(pure.sync),
        leave=jax.jit(pure.leave),
        encode=jax.jit(pure.encode),
        models=jax.jit(pure.models),
        homes=pure.homes,
        replay=pure.replay and Replay(jax.jit(pure.replay.keep), jax.jit(pure.replay.train)),
    )
    return algorithm, algorithm.enter(algorithm.init(jax.random.key(0)))


def diverse(state: CohortState) -> CohortState:
    """Make the clients' models and buffers differ, as after some steps without synchronization."""

    def noisy(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), tree
        )

    params, key_params, opt_state, *_ = state.clients
    clients = state.clients._replace(
        params=noisy(params), key_params=noisy(key_params), opt_state=noisy(opt_state)
    )
    return state._replace(clients=clients)


def assert_trees_close(one: Any, other: Any, *, rtol: float, atol: float = 0.0) -> None:
    assert str(jax.tree.structure(one)) == str(jax.tree.structure(other))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def client(tree: Any, i: int | jax.Array) -> Any:
    """Select one client of a stacked tree, or several."""
    return jax.tree.map(lambda leaf: leaf[i], tree)
