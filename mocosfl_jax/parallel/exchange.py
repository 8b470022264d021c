"""What devices exchange in a step: members of the cohort, rows of the batch, server parameters and keys.

The program is the one of a single device, partitioned by XLA. Only the models are run by each device on its
own shard.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mocosfl_jax.algorithm import concatenation, moco
from mocosfl_jax.algorithm.moco import MoCoQueue, QueueAccess
from mocosfl_jax.algorithm.placement import Placement, RowsModel, one_device
from mocosfl_jax.models.forms import Forms, at_once
from mocosfl_jax.parallel.mesh import CLIENTS, DATA, EVERY, MODEL, VIEWS, at, of_views, pad, pad_tree, share
from mocosfl_jax.parallel.state import tensor


def make_placement(mesh: Mesh, forms: Forms) -> Placement:
    """The functions that place an algorithm on a mesh, with the clients in the given form."""
    if mesh.size == 1:
        return one_device(forms)
    return Placement(
        over_clients=partial(_over_clients, mesh, forms),
        select=partial(_select, mesh),
        put_back=partial(_put_back, mesh),
        merge=partial(_merge, mesh),
        split=partial(_split, mesh),
        everywhere=partial(_everywhere, mesh),
        gather=partial(_gather, mesh),
        over_rows=partial(_over_rows, mesh),
        shared=QueueAccess(partial(_similarities, mesh), partial(_enqueue, mesh)),
    )


# --- from the pool to the cohort and back
#
# The device of each member is known only at run time. So blocks of the cohort, one per device, travel around
# the devices in a ring, and each device adds its own members to a block, or takes them out. No device ever
# holds more than its shard of the pool and one block.


def _select(mesh: Mesh, pool: Any, cohort: Array | None) -> Any:
    if cohort is None or not jax.tree.leaves(pool):
        return pool
    size, count = mesh.size, len(cohort)

    def of_device(pool: Any, blocks: Array) -> Any:
        me = jax.lax.axis_index(EVERY)

        def mine(block: Array) -> Any:
            """The members of the block that are on this device, and zeros for the others."""
            here, rows = _here(pool, blocks[block], me)
            return jax.tree.map(
                lambda leaf: jnp.where(
                    here.reshape(-1, *[1] * (leaf.ndim - 1)), leaf[rows], jnp.zeros((), leaf.dtype)
                ),
                pool,
            )

        def travel(moves: int, block: Any) -> Any:
            return jax.tree.map(jnp.add, _pass_on(mesh, block), mine((me - 1 - moves) % size))

        return jax.lax.fori_loop(1, size, travel, mine((me - 1) % size))

    members = _per_device(mesh, of_device, _blocks(cohort, size))(pad_tree(pool, size))
    return jax.tree.map(lambda leaf: at(mesh, leaf[:count], CLIENTS), members)


def _put_back(mesh: Mesh, pool: Any, members: Any, cohort: Array | None) -> Any:
    if cohort is None or not jax.tree.leaves(pool):
        return members
    size, count = mesh.size, len(jax.tree.leaves(pool)[0])

    def of_device(pool: Any, members: Any, blocks: Array) -> Any:
        me = jax.lax.axis_index(EVERY)

        def take(pool: Any, members: Any, block: Array) -> Any:
            here, rows = _here(pool, blocks[block], me)
            rows = jnp.where(here, rows, len(jax.tree.leaves(pool)[0]))  # rows beyond the end are dropped
            return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), pool, members)

        def travel(moves: int, carry: Any) -> Any:
            pool, members = carry
            members = _pass_on(mesh, members)
            return take(pool, members, (me - moves) % size), members

        return jax.lax.fori_loop(1, size, travel, (take(pool, members, me), members))[0]

    put = _per_device(mesh, of_device, _blocks(cohort, size))
    whole = put(pad_tree(pool, size), pad_tree(members, size))
    return jax.tree.map(lambda leaf: at(mesh, leaf[:count], CLIENTS), whole)


def _here(pool: Any, members: Array, me: Array) -> tuple[Array, Array]:
    """Whether each of the `members` is on this device, and in which row of its shard (row 0 if it is not)."""
    count = len(jax.tree.leaves(pool)[0])
    rows = members - me * count
    here = (rows >= 0) & (rows < count)
    return here, jnp.where(here, rows, 0)


def _blocks(cohort: Array, size: int) -> Array:
    """The cohort [M] as [size, m], padded with -1, which is on no device."""
    missing = share(len(cohort), size) * size - len(cohort)
    return jnp.pad(jnp.asarray(cohort), (0, missing), constant_values=-1).reshape(size, -1)


def _pass_on(mesh: Mesh, tree: Any, by: int = 1) -> Any:
    """Send every device's `tree` to the device `by` places further in the ring."""
    ring = [(i, (i + by) % mesh.size) for i in range(mesh.size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, EVERY, ring), tree)


def _per_device(mesh: Mesh, function: Callable[..., Any], *whole: Array) -> Callable[..., Any]:
    """`function` of each device's shard of some trees and of replicated arrays `whole`; returns shards."""
    return lambda *shards: jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*[CLIENTS] * len(shards), *[P()] * len(whole)),
        out_specs=CLIENTS,
        check_vma=False,
    )(*shards, *whole)


# --- concatenation


def _merge(mesh: Mesh, x: Array, real: np.ndarray | None = None) -> Array:
    if _in_place(mesh, (x.shape[0], x.shape[1]), real):
        return at(mesh, concatenation.merge(x), CLIENTS)
    real = np.ones(x.shape[:2], bool) if real is None else real
    rows = pad(x, mesh.size).reshape(-1, *x.shape[2:])
    count = int(real.sum())
    merged = _carry(mesh, rows, _legs(real, mesh.size), share(count, mesh.size))
    return at(mesh, merged[:count], CLIENTS)


def _split(mesh: Mesh, x: Array, shape: tuple[int, int], real: np.ndarray | None = None) -> Array:
    if _in_place(mesh, shape, real):
        return at(mesh, concatenation.split(x, shape), of_views(shape[0]))
    real = np.ones(shape, bool) if real is None else real
    places, batch = shape
    back = [Leg(-leg.by, leg.arrive, leg.leave) for leg in _legs(real, mesh.size)]
    rows = _carry(mesh, pad(x, mesh.size), back, share(places, mesh.size) * batch)
    return at(mesh, rows.reshape(-1, batch, *x.shape[1:])[:places], CLIENTS)


def _everywhere(mesh: Mesh, x: Array) -> Array:
    return at(mesh, x, P())


def _in_place(mesh: Mesh, shape: tuple[int, int], real: np.ndarray | None) -> bool:
    """Whether each device already has its share of the rows, because they are those of its clients.

    Of a single client, each device has a share of the images.
    """
    clients, batch = shape
    equal = clients % mesh.size == 0 or batch == 1 or (clients == 1 and batch % mesh.size == 0)
    return equal and (real is None or bool(real.all()))


class Leg(NamedTuple):
    """The rows that every device sends to the device `by` places further. D is the number of devices."""

    by: int
    leave: (
        np.ndarray
    )  # [D, c], row numbers on the sending device; numbers beyond the end are filled with zeros
    arrive: np.ndarray  # [D, c], row numbers on the receiving device; numbers beyond the end are dropped


def _legs(real: np.ndarray, size: int) -> list[Leg]:
    """How real rows move from the padded rows of the clients [M, B] to equal shares, one for each device.

    The rows keep the order of `concatenation.merge`, in which they are enqueued.
    """
    before = share(len(real), size) * real.shape[1]
    after = share(int(real.sum()), size)
    source, leave = np.divmod(np.flatnonzero(real), before)
    target, arrive = np.divmod(np.arange(len(source)), after)
    legs = []
    for by in np.unique((target - source) % size):
        sent = [((target - source) % size == by) & (source == device) for device in range(size)]
        width = max(int(rows.sum()) for rows in sent)
        leaves, arrives = np.full((size, width), before), np.full((size, width), after)
        for device, rows in enumerate(sent):
            leaves[device, : rows.sum()] = leave[rows]
            arrives[(device + by) % size, : rows.sum()] = arrive[rows]
        legs.append(Leg(int(by), leaves, arrives))
    return legs


def _carry(mesh: Mesh, rows: Array, legs: list[Leg], count: int) -> Array:
    """Move rows along the `legs`: `count` rows on every device, zeros where no row arrives."""

    def of_device(rows: Array) -> Array:
        me = jax.lax.axis_index(EVERY)
        result = jnp.zeros((count, *rows.shape[1:]), rows.dtype)
        for leg in legs:
            moving = rows.at[jnp.asarray(leg.leave)[me]].get(mode="fill", fill_value=0)
            moving = _pass_on(mesh, moving, leg.by) if leg.by else moving
            result = result.at[jnp.asarray(leg.arrive)[me]].set(moving, mode="drop")
        return result

    return _per_device(mesh, of_device)(rows)


# --- models: each device runs them on its own shard


def _over_clients(mesh: Mesh, forms: Forms, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*stacked: Any) -> Any:
        count = len(jax.tree.leaves(stacked)[0])
        if count == 1:  # its images are sharded instead
            return at_once(function)(*stacked)
        results = _per_device(mesh, forms.over_clients(function))(*(pad_tree(x, mesh.size) for x in stacked))
        return jax.tree.map(lambda leaf: at(mesh, leaf[:count], CLIENTS), results)

    return run


def _over_rows(mesh: Mesh, model: RowsModel) -> RowsModel:
    def run(params: Any, views: Array) -> Array:
        padded = jax.vmap(lambda rows: pad(rows, mesh.size))(views)
        of_device = concatenation.over_views(model)
        results = jax.shard_map(
            of_device, mesh=mesh, in_specs=(P(), VIEWS), out_specs=VIEWS, check_vma=False
        )(params, padded)
        return at(mesh, results[:, : views.shape[1]], VIEWS)

    return run


# --- the server


def _gather(mesh: Mesh, params: Any) -> Any:
    """Replicate `params` on every device. Their gradient is summed and sharded as the parameters rest."""

    @jax.custom_vjp
    def gather(leaf: Array) -> Array:
        return at(mesh, leaf, P())

    gather.defvjp(
        lambda leaf: (gather(leaf), None),
        # Replicated before it is sharded: XLA would otherwise shard everything that the gradient depends on.
        lambda _, grad: (at(mesh, at(mesh, grad, P()), tensor(mesh, grad.shape)),),
    )
    return jax.tree.map(gather, params)


def _similarities(mesh: Mesh, queue: MoCoQueue, query: Array) -> Array:
    """Queries meet all rows of the queue, and stay sharded over `data`."""
    return at(mesh, moco.similarities(queue, at(mesh, query, P(DATA))), P(DATA, MODEL))


def _enqueue(mesh: Mesh, queue: MoCoQueue, keys: Array, real: Array | None) -> MoCoQueue:
    """Keys go to every device, which keeps those that fall into its rows of the queue."""
    queue = moco.enqueue(queue, at(mesh, keys, P()), real)
    return MoCoQueue(at(mesh, queue.keys, P(MODEL)), queue.cursor)
