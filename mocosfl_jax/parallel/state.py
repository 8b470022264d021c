"""The states between programs, sharded over the mesh, and algorithms on such states.

What each client has of its own is sharded by client, and what all clients share is on every device. The
server's parameters, momentum model and SGD buffer are sharded over `model`, each tensor along its largest
divisible dimension. They are gathered where they are used, as in ZeRO and FSDP (Rajbhandari et al. 2020). The
rows of the shared queue are sharded over `model` too, but never gathered: queries are sent to them.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mocosfl_jax.algorithm.interface import (
    Algorithm,
    CohortState,
    Home,
    Replay,
    Step,
    StepInfo,
    SyncInfo,
    TrainState,
)
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.models import Features
from mocosfl_jax.parallel.mesh import CLIENTS, MODEL, at, of_views, pad, sharding

State = TypeVar("State", TrainState, CohortState)
Homes = Callable[[Any], Any]  # `Algorithm.homes`


def tensor(mesh: Mesh, shape: tuple[int, ...]) -> P:
    """The sharding of a tensor of the server: over `model`, along its largest divisible dimension."""
    size = mesh.shape[MODEL]
    fitting = [(n, -i) for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or not fitting:
        return P()
    return P(*[None] * -max(fitting)[1], MODEL)


def distribute(algorithm: Algorithm, mesh: Mesh) -> Algorithm:
    """The same algorithm on states that rest on the mesh between programs.

    Args:
      algorithm: Made with `exchange.make_placement` for this mesh.
      mesh: For a single device the algorithm is returned as it is.

    Returns:
      The algorithm, on states as returned by `rest`. Outputs of `step` and `sync` are replicated, except for
      smashed data, which has one shard of rows per device if the devices divide the rows.
    """
    if mesh.size == 1:
        return algorithm

    homes = algorithm.homes

    def inside(state: State) -> State:
        return without_padding(mesh, homes, state)

    def at_rest(state: State) -> State:
        return rest(mesh, homes, state)

    def whole(x: Any) -> Any:
        return None if x is None else at(mesh, x, P())

    def of_mesh(step: Step) -> Step:
        def run(state: CohortState, views: Views) -> tuple[CohortState, StepInfo]:
            views = Views(*(at(mesh, x, of_views(len(x))) for x in views))
            state, info = step(inside(state), views)
            return at_rest(state), _info(mesh, info)

        return run

    def sync(state: CohortState) -> tuple[CohortState, SyncInfo]:
        state, info = algorithm.sync(inside(state))
        return at_rest(state), SyncInfo(whole(info.divergence))

    def encode(state: TrainState, images: Array) -> Features:
        features = algorithm.encode(inside(state), at(mesh, whole(images), CLIENTS))
        return Features(*(whole(x) for x in features))

    def of_mesh_replay(replay: Replay) -> Replay:
        def train(
            state: CohortState, smashed: SmashedData, arrived: Array | None = None
        ) -> tuple[CohortState, StepInfo]:
            smashed = SmashedData(*(at(mesh, whole(x), CLIENTS) for x in smashed))
            state, info = replay.train(inside(state), smashed, whole(arrived))
            return at_rest(state), _info(mesh, info)

        return Replay(of_mesh(replay.keep), train)

    return Algorithm(
        init=lambda rng, models=None: at_rest(algorithm.init(rng, models)),
        enter=lambda state, cohort=None: at_rest(algorithm.enter(inside(state), whole(cohort))),
        step=of_mesh(algorithm.step),
        sync=sync,
        leave=lambda state: at_rest(algorithm.leave(inside(state))),
        encode=encode,
        models=lambda state: algorithm.models(inside(state)),
        homes=homes,
        replay=of_mesh_replay(algorithm.replay) if algorithm.replay else None,
    )


def specs(mesh: Mesh, homes: Homes, state: State) -> Any:
    """A PartitionSpec for each leaf of `state`, as a tree of the same structure."""

    def spec(home: Home, leaf: Any) -> P:
        if home.kind == "server":
            return tensor(mesh, leaf.shape)
        return {"everywhere": P(), "clients": CLIENTS, "queue": P(MODEL)}[home.kind]

    return jax.tree.map(spec, jax.tree.broadcast(homes(state), state), state)


def placed(mesh: Mesh, homes: Homes, state: State) -> Any:
    """Shapes and dtypes of a state at rest, with the sharding of each leaf.

    Args:
      mesh: The mesh on which the state rests.
      homes: Of the algorithm.
      state: Shapes and dtypes, as from `jax.eval_shape`.
    """
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, spec)),
        state,
        specs(mesh, homes, state),
    )


def without_padding(mesh: Mesh, homes: Homes, state: State) -> State:
    """The state inside a program, where it lacks the padding that it has at rest."""

    def place(leaf: Array, home: Home, spec: P) -> Array:
        return at(mesh, leaf[: home.count] if home.kind == "clients" else leaf, spec)

    return jax.tree.map(place, state, jax.tree.broadcast(homes(state), state), specs(mesh, homes, state))


def rest(mesh: Mesh, homes: Homes, state: State) -> State:
    """The state between programs, padded with zeros to the same number of clients on each device.

    With zeros, the fingerprint of a checkpoint does not depend on the amount of padding.
    """

    def place(leaf: Array, home: Home, spec: P) -> Array:
        return at(mesh, pad(leaf, mesh.size) if home.kind == "clients" else leaf, spec)

    return jax.tree.map(place, state, jax.tree.broadcast(homes(state), state), specs(mesh, homes, state))


def _info(mesh: Mesh, info: StepInfo) -> StepInfo:
    def place(x: Array) -> Array:
        return at(mesh, x, CLIENTS if x.ndim and len(x) % mesh.size == 0 else P())

    return jax.tree.map(place, info)
