"""The training state between programs, sharded over the mesh, and algorithms on such states.

The server's parameters, momentum model and SGD buffer are sharded over `model`, each tensor along its largest
divisible dimension. They are gathered where they are used, as in ZeRO and FSDP (Rajbhandari et al. 2020). The
rows of the shared queue are sharded over `model` too, but never gathered: queries are sent to them.
"""

from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import GetAttrKey

from mocosfl_jax.algorithm.interface import Algorithm, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.server import ServerState
from mocosfl_jax.models import Features
from mocosfl_jax.parallel.mesh import CLIENTS, MODEL, at, of_views, pad


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
      The algorithm, on a TrainState as returned by `rest`. Outputs of `step` and `sync` are replicated,
      except for smashed data, which has one shard of rows per device if the devices divide the rows.
    """
    if mesh.size == 1:
        return algorithm

    def inside(state: TrainState) -> TrainState:
        return enter(mesh, num_clients, state)

    def whole(x: Any) -> Any:
        return None if x is None else at(mesh, x, P())

    def step(
        state: TrainState, views: Views, cohort: Array | None = None, **options: Any
    ) -> tuple[TrainState, StepInfo]:
        views = Views(*(at(mesh, x, of_views(len(x))) for x in views))
        state, info = algorithm.step(inside(state), views, whole(cohort), **options)
        return rest(mesh, state), _info(mesh, info)

    def sync(state: TrainState, cohort: Array | None = None) -> tuple[TrainState, SyncInfo]:
        state, info = algorithm.sync(inside(state), whole(cohort))
        return rest(mesh, state), SyncInfo(whole(info.divergence))

    def encode(state: TrainState, images: Array) -> Features:
        features = algorithm.encode(inside(state), at(mesh, whole(images), CLIENTS))
        return Features(*(whole(x) for x in features))

    def replay(
        state: TrainState, smashed: SmashedData, cohort: Array | None = None
    ) -> tuple[TrainState, StepInfo]:
        assert algorithm.replay is not None
        smashed = SmashedData(*(at(mesh, whole(x), CLIENTS) for x in smashed))
        state, info = algorithm.replay(inside(state), smashed, whole(cohort))
        return rest(mesh, state), _info(mesh, info)

    return Algorithm(
        init=lambda rng: rest(mesh, algorithm.init(rng)),
        step=step,
        sync=sync,
        encode=encode,
        replay=replay if algorithm.replay else None,
    )


def specs(mesh: Mesh, state: TrainState) -> Any:
    """A PartitionSpec for each leaf of `state`, as a tree of the same structure."""

    def place(path: Any, leaf: Array) -> P:
        names = [str(part.name) for part in path if isinstance(part, GetAttrKey)]
        if names == ["step"]:
            return P()
        if names[0] == "clients" or not isinstance(state.server, ServerState):
            return CLIENTS  # the server of FL-MoCo holds only the queues of the clients
        if "queue" not in names:
            return tensor(mesh, leaf.shape)
        if state.server.queue.keys.ndim > 2:
            return CLIENTS
        return P(MODEL) if names[-1] == "keys" else P()

    return jax.tree_util.tree_map_with_path(place, state)


def enter(mesh: Mesh, num_clients: int, state: TrainState) -> TrainState:
    """The state inside a program, without the padding that it has at rest."""

    def place(leaf: Array, spec: P) -> Array:
        return at(mesh, leaf[:num_clients] if spec == CLIENTS else leaf, spec)

    return jax.tree.map(place, state, specs(mesh, state))


def rest(mesh: Mesh, state: TrainState) -> TrainState:
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
