"""One step over many devices: the mesh, and where each array of the training state lives.

The only module that names devices, mesh axes and partition specs. The program is that of one device; here is
said where its arrays are, and XLA partitions it; only the models are run by each device on its own piece. The
mesh has two axes, `data` and `model`.

- Every stack of clients (pool, cohort, their images, views and smashed data, queues per client) and the
  concatenated batch are cut into one piece a device, over `data` and `model` together: along `data` alone,
  the devices along `model` would hold and compute the same clients. With `model` = 1, the default, it is
  `data` alone.
- The server's parameters, their momentum copy and the SGD buffer are cut over `model`, each tensor along its
  largest dimension that divides, and gathered where they are used, as ZeRO and FSDP do (Rajbhandari et al.
  2020). So are the rows of the queue that all clients share, but these are never gathered: queries come to
  them.

A number of clients that does not divide by the devices is padded: with clients that are zeros at rest and
where models are run, and elsewhere by XLA, which masks the padding wherever it sums over it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import GetAttrKey

from mocosfl_jax import config
from mocosfl_jax.algorithm import clients, concatenation, moco
from mocosfl_jax.algorithm.interface import Algorithm, StepInfo, SyncInfo, TrainState
from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.algorithm.moco import Memory, MoCoQueue
from mocosfl_jax.algorithm.placement import ONE_DEVICE, Placement, RowsModel
from mocosfl_jax.algorithm.server import ServerState
from mocosfl_jax.errors import UserError
from mocosfl_jax.models import Features
from mocosfl_jax.runtime import hosts

DATA, MODEL = "data", "model"
EVERY = (DATA, MODEL)  # both axes as one: a piece for every device
CLIENTS = P(EVERY)  # leading axis of clients, or of the rows of the concatenated batch
VIEWS = P(None, EVERY)  # views of the concatenated batch [views, n, ...]


def make_mesh(sizes: config.Mesh) -> Mesh | None:
    """The mesh of a configuration; None where one device does it all.

    A size of None takes what the other leaves of the devices; without any, all are on `data`. Where both are
    given, they may leave devices out.

    Raises:
      UserError: if there are not as many devices, or if they cannot be shared out evenly.
    """
    devices = jax.devices()
    count = len(devices)
    if sizes.data is not None and sizes.model is not None:
        data, model = sizes.data, sizes.model
        if data * model > count:
            raise UserError(
                f"config.mesh: found data {data} and model {model}, allowed: a product of at most {count}, "
                "the number of devices"
            )
    else:
        for name, size in (("data", sizes.data), ("model", sizes.model)):
            if size is not None and count % size:
                allowed = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
                raise UserError(
                    f"config.mesh.{name}: found {size}, allowed: {allowed} (divisors of {count}, the number "
                    "of devices)"
                )
        model = sizes.model or count // (sizes.data or count)
        data = count // model
    if hosts.several() and data * model < count:
        raise UserError(
            f"config.mesh: found data {data} and model {model}, allowed: a product of {count}, the number of "
            "devices, where these belong to several processes"
        )
    if data * model == 1:
        return None
    # Of axis type Auto: XLA partitions the algorithm, from what is said here.
    return jax.make_mesh(
        (data, model), EVERY, axis_types=(AxisType.Auto,) * 2, devices=devices[: data * model]
    )


def check_queue(mesh: Mesh | None, queue_size: int) -> None:
    """Raise UserError if the rows of the shared queue cannot be cut over `model`."""
    model = 1 if mesh is None else mesh.shape[MODEL]
    if queue_size % model:
        raise UserError(
            f"config.moco.queue_size: found {queue_size}, allowed: multiples of {model} (config.mesh.model)"
        )


def describe(mesh: Mesh | None) -> str:
    """The mesh in words, nothing for one device: the part of a sentence."""
    return "" if mesh is None else f", mesh of data {mesh.shape[DATA]} x model {mesh.shape[MODEL]}"


def replicate(mesh: Mesh | None, array: np.ndarray) -> Array:
    """`array` on every device of the mesh."""
    return jax.device_put(array, None if mesh is None else NamedSharding(mesh, P()))


def of_clients(mesh: Mesh | None, count: int) -> NamedSharding | None:
    """Where a stack of `count` clients goes: a piece to each device, where they divide."""
    if mesh is None:
        return None
    return NamedSharding(mesh, CLIENTS if count % mesh.size == 0 else P())


def of_images(mesh: Mesh | None, places: int) -> NamedSharding | None:
    """Where images of steps [s, M, B, H, W, 3], `padded`, go: to the devices of their clients."""
    return None if mesh is None else NamedSharding(mesh, P(None, *_views(places)))


def padded(mesh: Mesh | None, places: int, batch: int) -> tuple[int, int]:
    """M and B of images that `of_images` cuts, with places that only fill up the devices."""
    size = 1 if mesh is None else mesh.size
    return (places, _share(batch, size) * size) if places == 1 else (_share(places, size) * size, batch)


def make_spread(mesh: Mesh | None, places: int, batch: int) -> Callable[[Array], Array]:
    """How a step spreads its images, for `rounds`: to the devices of their clients.

    Takes them as `padded` says, and gives [places, batch, H, W, 3].
    """
    if mesh is None:
        return lambda images: images

    def spread(images: Array) -> Array:
        images = images[:places, :batch]
        return _at(mesh, images, _views(places))

    return spread


def make_placement(mesh: Mesh | None) -> Placement:
    """The functions by which the algorithm is placed on a mesh; None: on one device."""
    if mesh is None:
        return ONE_DEVICE
    return Placement(
        over_clients=partial(_over_clients, mesh),
        select=partial(_select, mesh),
        put_back=partial(_put_back, mesh),
        merge=partial(_merge, mesh),
        split=partial(_split, mesh),
        gather=partial(_gather, mesh),
        over_rows=partial(_over_rows, mesh),
        shared=Memory(partial(_similarities, mesh), partial(_enqueue, mesh)),
    )


def distribute(algorithm: Algorithm, mesh: Mesh | None, num_clients: int) -> Algorithm:
    """The same algorithm on states that are at rest on the mesh.

    Args:
      algorithm: made with the `make_placement` of this mesh.
      mesh: of `make_mesh`; None gives the algorithm back.
      num_clients: N.

    Returns:
      Functions of a TrainState as `rest` leaves it. What a step and `sync` tell is small and on every
      device, but for smashed data, of which each device has its rows where they divide.
    """
    if mesh is None:
        return algorithm

    def inside(state: TrainState) -> TrainState:
        return enter(mesh, num_clients, state)

    def whole(x: Any) -> Any:
        return None if x is None else _at(mesh, x, P())

    def step(
        state: TrainState, views: Views, cohort: Array | None = None, **options: Any
    ) -> tuple[TrainState, StepInfo]:
        views = Views(*(_at(mesh, x, _views(len(x))) for x in views))
        state, info = algorithm.step(inside(state), views, whole(cohort), **options)
        return rest(mesh, state), _info(mesh, info)

    def sync(state: TrainState, cohort: Array | None = None) -> tuple[TrainState, SyncInfo]:
        state, info = algorithm.sync(inside(state), whole(cohort))
        return rest(mesh, state), SyncInfo(whole(info.divergence))

    def encode(state: TrainState, images: Array) -> Features:
        features = algorithm.encode(inside(state), _at(mesh, whole(images), CLIENTS))
        return Features(*(whole(x) for x in features))

    def replay(
        state: TrainState, smashed: SmashedData, cohort: Array | None = None
    ) -> tuple[TrainState, StepInfo]:
        assert algorithm.replay is not None
        smashed = SmashedData(*(_at(mesh, whole(x), CLIENTS) for x in smashed))
        state, info = algorithm.replay(inside(state), smashed, whole(cohort))
        return rest(mesh, state), _info(mesh, info)

    return Algorithm(
        init=lambda rng: rest(mesh, algorithm.init(rng)),
        step=step,
        sync=sync,
        encode=encode,
        replay=replay if algorithm.replay else None,
    )


# --- the state at rest


def specs(mesh: Mesh, state: TrainState) -> Any:
    """A PartitionSpec for each leaf of `state`, as a tree of the same structure."""

    def place(path: Any, leaf: Array) -> P:
        names = [str(part.name) for part in path if isinstance(part, GetAttrKey)]
        if names == ["step"]:
            return P()
        if names[0] == "clients" or not isinstance(state.server, ServerState):
            return CLIENTS  # FL-MoCo has nothing on its server but the clients' queues
        if "queue" not in names:
            return _tensor(mesh, leaf.shape)
        if state.server.queue.keys.ndim > 2:
            return CLIENTS
        return P(MODEL) if names[-1] == "keys" else P()

    return jax.tree_util.tree_map_with_path(place, state)


def _tensor(mesh: Mesh, shape: tuple[int, ...]) -> P:
    """Of a tensor of the server: its largest dimension that divides is cut over `model`."""
    size = mesh.shape[MODEL]
    fitting = [(n, -i) for i, n in enumerate(shape) if n % size == 0]
    if size == 1 or not fitting:
        return P()
    return P(*[None] * -max(fitting)[1], MODEL)


def _at(mesh: Mesh, x: Array, spec: P) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _share(count: int, size: int) -> int:
    """How many of `count` each of `size` devices has, the last ones fewer."""
    return math.ceil(count / size)


def enter(mesh: Mesh, num_clients: int, state: TrainState) -> TrainState:
    """The state within a program, without the clients that pad it at rest."""

    def place(leaf: Array, spec: P) -> Array:
        return _at(mesh, leaf[:num_clients] if spec == CLIENTS else leaf, spec)

    return jax.tree.map(place, state, specs(mesh, state))


def rest(mesh: Mesh, state: TrainState) -> TrainState:
    """The state as it is between programs, which want as many clients on each device: zeros are the rest.

    Zeros, so that a checkpoint's fingerprint does not depend on how many there are.
    """

    def place(leaf: Array, spec: P) -> Array:
        return _at(mesh, _pad(leaf, mesh.size) if spec == CLIENTS else leaf, spec)

    return jax.tree.map(place, state, specs(mesh, state))


def _pad(x: Array, size: int) -> Array:
    """[n, ...] with rows of zeros behind, so that `size` divides it."""
    missing = _share(len(x), size) * size - len(x)
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def _views(places: int) -> P:
    """Of images [M, B, ...]. One client alone, as in centralised MoCo, has its images shared out instead."""
    return CLIENTS if places > 1 else VIEWS


def _info(mesh: Mesh, info: StepInfo) -> StepInfo:
    def place(x: Array) -> Array:
        return _at(mesh, x, CLIENTS if x.ndim and len(x) % mesh.size == 0 else P())

    return jax.tree.map(place, info)


# --- cohort out of the pool and back
#
# Nobody knows beforehand on which device a member is. So blocks of the cohort, as large as what a device has
# of it in the end, travel around the devices in a ring, and each adds to them or takes from them what is
# its own: no device ever holds more than its share and one block.


def _select(mesh: Mesh, pool: Any, cohort: Array | None) -> Any:
    if cohort is None:
        return pool
    size, count = mesh.size, len(cohort)

    def of_device(pool: Any, blocks: Array) -> Any:
        me = jax.lax.axis_index(EVERY)

        def mine(block: Array) -> Any:
            """This device's members among those in the block, zeros for the others."""
            here, rows = _here(pool, blocks[block], me)
            return jax.tree.map(
                lambda leaf: jnp.where(here.reshape(-1, *[1] * (leaf.ndim - 1)), leaf[rows], 0), pool
            )

        def travel(moves: int, block: Any) -> Any:
            return jax.tree.map(jnp.add, _pass_on(mesh, block), mine((me - 1 - moves) % size))

        return jax.lax.fori_loop(1, size, travel, mine((me - 1) % size))

    members = _per_device(mesh, of_device, _blocks(cohort, size))(_pad_tree(pool, size))
    return jax.tree.map(lambda leaf: _at(mesh, leaf[:count], CLIENTS), members)


def _put_back(mesh: Mesh, pool: Any, members: Any, cohort: Array | None) -> Any:
    if cohort is None:
        return members
    size, count = mesh.size, len(jax.tree.leaves(pool)[0])

    def of_device(pool: Any, members: Any, blocks: Array) -> Any:
        me = jax.lax.axis_index(EVERY)

        def take(pool: Any, members: Any, block: Array) -> Any:
            here, rows = _here(pool, blocks[block], me)
            rows = jnp.where(here, rows, len(jax.tree.leaves(pool)[0]))  # beyond the end: dropped
            return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), pool, members)

        def travel(moves: int, carry: Any) -> Any:
            pool, members = carry
            members = _pass_on(mesh, members)
            return take(pool, members, (me - moves) % size), members

        return jax.lax.fori_loop(1, size, travel, (take(pool, members, me), members))[0]

    put = _per_device(mesh, of_device, _blocks(cohort, size))
    whole = put(_pad_tree(pool, size), _pad_tree(members, size))
    return jax.tree.map(lambda leaf: _at(mesh, leaf[:count], CLIENTS), whole)


def _here(pool: Any, members: Array, me: Array) -> tuple[Array, Array]:
    """Which of the `members` this device has, and in which of its rows (any row for the others)."""
    count = len(jax.tree.leaves(pool)[0])
    rows = members - me * count
    here = (rows >= 0) & (rows < count)
    return here, jnp.where(here, rows, 0)


def _blocks(cohort: Array, size: int) -> Array:
    """The cohort [M] as [size, m], padded with a client that nobody has."""
    missing = _share(len(cohort), size) * size - len(cohort)
    return jnp.pad(jnp.asarray(cohort), (0, missing), constant_values=-1).reshape(size, -1)


def _pad_tree(tree: Any, size: int) -> Any:
    return jax.tree.map(lambda leaf: _pad(leaf, size), tree)


def _pass_on(mesh: Mesh, tree: Any, by: int = 1) -> Any:
    """Every device's `tree` to the device `by` further on in the ring."""
    ring = [(i, (i + by) % mesh.size) for i in range(mesh.size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, EVERY, ring), tree)


def _per_device(mesh: Mesh, function: Callable[..., Any], *whole: Array) -> Callable[..., Any]:
    """`function` of each device's piece of some trees, and of `whole`; its results are pieces again."""
    return lambda *pieces: jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*[CLIENTS] * len(pieces), *[P()] * len(whole)),
        out_specs=CLIENTS,
        check_vma=False,
    )(*pieces, *whole)


# --- concatenation


def _merge(mesh: Mesh, x: Array, real: np.ndarray | None = None) -> Array:
    if _in_place(mesh, x.shape[:2], real):
        return _at(mesh, concatenation.merge(x), CLIENTS)
    real = np.ones(x.shape[:2], bool) if real is None else real
    rows = _pad(x, mesh.size).reshape(-1, *x.shape[2:])
    count = int(real.sum())
    merged = _carry(mesh, rows, _legs(real, mesh.size), _share(count, mesh.size))
    return _at(mesh, merged[:count], CLIENTS)


def _split(mesh: Mesh, x: Array, shape: tuple[int, int], real: np.ndarray | None = None) -> Array:
    if _in_place(mesh, shape, real):
        return _at(mesh, concatenation.split(x, shape), CLIENTS)
    real = np.ones(shape, bool) if real is None else real
    places, batch = shape
    back = [Leg(-leg.by, leg.arrive, leg.leave) for leg in _legs(real, mesh.size)]
    rows = _carry(mesh, _pad(x, mesh.size), back, _share(places, mesh.size) * batch)
    return _at(mesh, rows.reshape(-1, batch, *x.shape[1:])[:places], CLIENTS)


def _in_place(mesh: Mesh, shape: tuple[int, ...], real: np.ndarray | None) -> bool:
    """Whether a device's share of the rows are those of its share of the clients."""
    return (real is None or bool(real.all())) and (shape[0] % mesh.size == 0 or shape[1] == 1)


class Leg(NamedTuple):
    """The rows that go to the device that is `by` further on, as the devices D count their own rows."""

    by: int
    leave: np.ndarray  # [D, c], where they are; beyond the end: there is none
    arrive: np.ndarray  # [D, c], where they go


def _legs(real: np.ndarray, size: int) -> list[Leg]:
    """How real rows get from the clients' places, padded [M, B], to an equal share for each device.

    In the order of `concatenation.merge`, which the queue takes them in.
    """
    before = _share(len(real), size) * real.shape[1]
    after = _share(int(real.sum()), size)
    source, leave = np.divmod(np.flatnonzero(real), before)
    target, arrive = np.divmod(np.arange(len(source)), after)
    legs = []
    for by in np.unique((target - source) % size):
        gone = [((target - source) % size == by) & (source == device) for device in range(size)]
        width = max(int(g.sum()) for g in gone)
        leaves, arrives = np.full((size, width), before), np.full((size, width), after)
        for device, g in enumerate(gone):
            leaves[device, : g.sum()] = leave[g]
            arrives[(device + by) % size, : g.sum()] = arrive[g]
        legs.append(Leg(int(by), leaves, arrives))
    return legs


def _carry(mesh: Mesh, rows: Array, legs: list[Leg], count: int) -> Array:
    """Every device's `count` rows after the `legs`, zeros where none has arrived."""

    def of_device(rows: Array) -> Array:
        me = jax.lax.axis_index(EVERY)
        result = jnp.zeros((count, *rows.shape[1:]), rows.dtype)
        for leg in legs:
            moving = rows.at[jnp.asarray(leg.leave)[me]].get(mode="fill", fill_value=0)
            moving = _pass_on(mesh, moving, leg.by) if leg.by else moving
            result = result.at[jnp.asarray(leg.arrive)[me]].set(moving, mode="drop")
        return result

    return _per_device(mesh, of_device)(rows)


# --- models: each device runs them on what it has, as one device alone would


def _over_clients(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*stacked: Any) -> Any:
        count = len(jax.tree.leaves(stacked)[0])
        if count == 1:  # whose images are shared out
            return clients.at_once(function)(*stacked)
        results = _per_device(mesh, clients.over_clients(function))(
            *(_pad_tree(x, mesh.size) for x in stacked)
        )
        return jax.tree.map(lambda leaf: _at(mesh, leaf[:count], CLIENTS), results)

    return run


def _over_rows(mesh: Mesh, model: RowsModel) -> RowsModel:
    def run(params: Any, views: Array) -> Array:
        padded = jax.vmap(lambda rows: _pad(rows, mesh.size))(views)
        results = jax.shard_map(model, mesh=mesh, in_specs=(P(), VIEWS), out_specs=VIEWS, check_vma=False)(
            params, padded
        )
        return _at(mesh, results[:, : views.shape[1]], VIEWS)

    return run


# --- the server


def _gather(mesh: Mesh, params: Any) -> Any:
    """The whole of `params` on every device; their gradient is summed to where they rest."""

    @jax.custom_vjp
    def gather(leaf: Array) -> Array:
        return _at(mesh, leaf, P())

    gather.defvjp(
        lambda leaf: (gather(leaf), None),
        # Replicated before it is cut: XLA would take the cut as a wish to cut all that it is computed from.
        lambda _, grad: (_at(mesh, _at(mesh, grad, P()), _tensor(mesh, grad.shape)),),
    )
    return jax.tree.map(gather, params)


def _similarities(mesh: Mesh, queue: MoCoQueue, query: Array) -> Array:
    """Queries go to all rows of the queue, and stay cut over `data`."""
    return _at(mesh, moco.similarities(queue, _at(mesh, query, P(DATA))), P(DATA, MODEL))


def _enqueue(mesh: Mesh, queue: MoCoQueue, keys: Array) -> MoCoQueue:
    """Keys go everywhere; each device keeps those of its rows of the queue."""
    queue = moco.enqueue(queue, _at(mesh, keys, P()))
    return MoCoQueue(_at(mesh, queue.keys, P(MODEL)), queue.cursor)
