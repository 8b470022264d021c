"""Where the arrays of a training step live, as far as the algorithm has to say: a few functions.

None of them changes a value. The algorithm calls them where data passes from one stack of clients to
another, or from the clients to the server; by default all is on one device and they are the plain functions.
`sharding` makes those of a mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from mocosfl_jax import clients, concatenation, moco, server


class Placement(NamedTuple):
    """How one step's data passes between client pool, cohort, concatenated batch, server and queue."""

    # The client-side model of one client -> of a cohort
    over_clients: Callable[[clients.ClientModel], clients.CohortModel] = clients.over_clients
    # pool [N, ...], cohort [M] or None -> members [M, ...]
    select: Callable[[Any, Array | None], Any] = clients.select
    # pool [N, ...], members [M, ...], cohort [M] or None -> pool
    put_back: Callable[[Any, Any, Array | None], Any] = clients.put_back
    # [M, B, ...], which rows are real [M, B] or None -> concatenated batch [n, ...]
    merge: Callable[..., Array] = concatenation.merge
    # concatenated batch [n, ...], (M, B), which rows are real -> [M, B, ...], zeros elsewhere
    split: Callable[..., Array] = concatenation.split
    # The server's parameters, as they are at rest -> where they are used
    gather: Callable[[Any], Any] = lambda params: params
    # The server-side model of one view -> of several
    over_views: Callable[[server.Projection], server.ViewsProjection] = server.at_once
    # How queries meet the queue that all clients share, and how it takes their keys
    shared: moco.Memory = moco.SHARED


ONE_DEVICE = Placement()
