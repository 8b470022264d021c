"""The states between programs, sharded over the mesh, and algorithms on such states.

What each client has of its own is sharded by client, and what all clients share is on every device. The
server's parameters, momentum model and SGD buffer are sharded over `model`, each tensor along its largest
divisible dimension. They are gathered where they are used, as in ZeRO and FSDP (Rajbhandari et al. 2020). The
rows of the shared queue are sharded over `model` too, but never gathered: queries are sent to them.
"""

from typing import Any, TypeVar

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mocosfl_jax.algorithm.interface import Algorithm, CohortState, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.models import Features
from mocosfl_jax.parallel.mesh import CLIENTS, MODEL, at, of_views, pad, sharding

State = TypeVar("State", TrainState, CohortState)


def tensor(mesh: Mesh, shape: tuple[int, ...]) -> P:
    """The sharding of a tensor of the server: over `model`, along its largest divisible dimension."""
    size = mesh.shape[MODEL]
    fitting = [(n, -i) for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or not fitting:
        return P()
    return P(*[None] * -max(fitting)[1], MODEL)


def distribute(algorithm: Algorithm, mesh: Mesh, num_clients: int) -> Algorithm:
    """The same algorithm on states that rest on the mesh between programs.

    Args:
      algorithm: Made with `exchange.make_placement` for this mesh.
      mesh: For a single device the algorithm is returned as it is.
      num_clients: N.

    Returns:
      The algorithm, on states as returned by `rest`. Outputs of `step` and `sync` are replicated, except for
      smashed data, which has one shard of rows per device if the devices divide the rows.
    """
    if mesh.size == 1:
        return algorithm

    def inside(state: State) -> State:
        return without_padding(mesh, num_clients, state)

    def whole(x: Any) -> Any:
        return None if x is None else at(mesh, x, P())

    def step(state: CohortState, views: Views, **options: Any) -> tuple[CohortState, StepInfo]:
        views = Views(*(at(mesh, x, of_views(len(x))) for x in views))
        state, info = algorithm.step(inside(state), views, **options)
        return rest(mesh, state), _info(mesh, info)

    def sync(state: CohortState) -> tuple[CohortState, SyncInfo]:
        state, info = algorithm.sync(inside(state))
        return rest(mesh, state), SyncInfo(whole(info.divergence))

    def encode(state: TrainState, images: Array) -> Features:
        features = algorithm.encode(inside(state), at(mesh, whole(images), CLIENTS))
        return Features(*(whole(x) for x in features))

    def replay(state: CohortState, smashed: SmashedData) -> tuple[CohortState, StepInfo]:
        assert algorithm.replay is not None
        smashed = SmashedData(*(at(mesh, whole(x), CLIENTS) for x in smashed))
        state, info = algorithm.replay(inside(state), smashed)
        return rest(mesh, state), _info(mesh, info)

    return Algorithm(
        init=lambda rng: rest(mesh, algorithm.init(rng)),
        enter=lambda state, cohort=None: rest(mesh, algorithm.enter(inside(state), whole(cohort))),
        step=step,
        sync=sync,
        leave=lambda state: rest(mesh, algorithm.leave(inside(state))),
        encode=encode,
        replay=replay if algorithm.replay else None,
    )


def specs(mesh: Mesh, state: State) -> Any:
    """A PartitionSpec for each leaf of `state`, as a tree of the same structure."""
    places: Any = jax.tree.map(lambda leaf: P(), state)
    if state.server is not None:
        places = places._replace(server=jax.tree.map(lambda leaf: tensor(mesh, leaf.shape), state.server))
        if state.server.queue is not None:
            queue = places.server.queue._replace(keys=P(MODEL), cursor=P())
            places = places._replace(server=places.server._replace(queue=queue))
    if state.pool is not None:
        own = jax.tree.map(lambda leaf: CLIENTS, state.pool.own)
        places = places._replace(pool=places.pool._replace(own=own))
    if isinstance(state, CohortState):
        places = places._replace(clients=jax.tree.map(lambda leaf: CLIENTS, state.clients))
    return places


def placed(mesh: Mesh, state: State) -> Any:
    """Shapes and dtypes of a state at rest, with the sharding of each leaf.

    Args:
      mesh: The mesh on which the state rests.
      state: Shapes and dtypes, as from `jax.eval_shape`.
    """
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, spec)),
        state,
        specs(mesh, state),
    )


def without_padding(mesh: Mesh, num_clients: int, state: State) -> State:
    """The state inside a program, where it lacks the padding that it has at rest."""

    def place(count: int, tree: Any, places: Any) -> Any:
        return jax.tree.map(
            lambda leaf, spec: at(mesh, leaf[:count] if spec == CLIENTS else leaf, spec), tree, places
        )

    inside: Any = state
    places = specs(mesh, state)
    if isinstance(state, CohortState) and state.cohort is not None:
        inside = state._replace(clients=place(len(state.cohort), state.clients, places.clients))
    return place(num_clients, inside, places)


def rest(mesh: Mesh, state: State) -> State:
    """The state between programs, padded with zeros to the same number of clients on each device.

    With zeros, the fingerprint of a checkpoint does not depend on the amount of padding.
    """

    def place(leaf: Array, spec: P) -> Array:
        return at(mesh, pad(leaf, mesh.size) if spec == CLIENTS else leaf, spec)

    return jax.tree.map(place, state, specs(mesh, state))


def _info(mesh: Mesh, info: StepInfo) -> StepInfo:
    def place(x: Array) -> Array:
        return at(mesh, x, CLIENTS if x.ndim and len(x) % mesh.size == 0 else P())

    return jax.tree.map(place, info)
