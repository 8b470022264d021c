"""How a training step moves its arrays between client pool, cohort, concatenated batch, server and queue.

The algorithm calls the functions of a `Placement` wherever data moves. None of them changes a value. On one
device they are the plain functions; `parallel.exchange` makes those of a mesh.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from mocosfl_jax.algorithm import clients, concatenation, moco
from mocosfl_jax.models.forms import ACCELERATOR, Forms

RowsModel = Callable[[Any, Array], Array]  # params, x [n, h, w, c] -> [n, D]


class Placement(NamedTuple):
    """The functions that move the data of one training step."""

    # A function of one client -> the same of stacks of clients [M, ...]
    over_clients: Callable[[Callable[..., Any]], Callable[..., Any]]
    # pool [N, ...], cohort [M] or None -> members [M, ...]
    select: Callable[[Any, Array | None], Any] = clients.select
    # pool [N, ...], members [M, ...], cohort [M] or None -> pool
    put_back: Callable[[Any, Any, Array | None], Any] = clients.put_back
    # [M, B, ...], mask of the real rows [M, B] or None -> concatenated batch [n, ...]
    merge: Callable[..., Array] = concatenation.merge
    # concatenated batch [n, ...], (M, B), mask of the real rows -> [M, B, ...], zeros elsewhere
    split: Callable[..., Array] = concatenation.split
    # An array -> a copy of it on every device
    everywhere: Callable[[Array], Array] = lambda x: x
    # The server's parameters at rest -> the same parameters where they are used
    gather: Callable[[Any], Any] = lambda params: params
    # A model that treats each row of a batch by itself -> the same model on several views [views, n, ...],
    # which it gets as one batch
    over_rows: Callable[[RowsModel], RowsModel] = concatenation.over_views
    # Access to the queue that all clients share
    shared: moco.QueueAccess = moco.SHARED


def one_device(forms: Forms) -> Placement:
    """Everything on one device, with the clients in the form of a platform, such as `forms("cpu")`."""
    return Placement(forms.over_clients)


ONE_DEVICE = one_device(ACCELERATOR)
