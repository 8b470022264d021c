"""Where the arrays of a training step live, as far as the algorithm has to say: a few functions.

None of them changes a value. The algorithm calls them where data passes from one stack of clients to
another, or from the clients to the server; by default all is on one device and they are the plain functions.
`parallel.exchange` makes those of a mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from mocosfl_jax.algorithm import clients, concatenation, moco
from mocosfl_jax.models.forms import ACCELERATOR, Forms

RowsModel = Callable[[Any, Array], Array]  # params, x [..., n, h, w, c] -> [..., n, D]


class Placement(NamedTuple):
    """How one step's data passes between client pool, cohort, concatenated batch, server and queue."""

    # A function of one client -> the same of stacks of clients [M, ...]
    over_clients: Callable[[Callable[..., Any]], Callable[..., Any]]
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
    # A model of a batch, each of its rows by itself -> the same of views of the batch [views, n, ...]
    over_rows: Callable[[RowsModel], RowsModel] = lambda model: model
    # How queries meet the queue that all clients share, and how it takes their keys
    shared: moco.QueueAccess = moco.SHARED


def one_device(forms: Forms) -> Placement:
    """Everything on one device, with the clients in the form of its platform."""
    return Placement(forms.over_clients)


ONE_DEVICE = one_device(ACCELERATOR)
