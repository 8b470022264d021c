"""The interface of an algorithm: its states, its functions and their outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from mocosfl_jax.algorithm.clients import ClientState, Pool
from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.models import Features


class TrainState(NamedTuple):
    """Everything that training changes, while no cohort is training. This is what a checkpoint holds.

    States hold arrays only, so they can be donated and sharded.
    """

    step: Array  # [] int32, number of training steps taken
    pool: Pool  # the N clients
    server: Any  # `ServerState`; None in the baseline FL-MoCo, which has no server-side model


class CohortState(NamedTuple):
    """The state while a cohort is training. A step reads and writes all of it except the pool."""

    step: Array  # [] int32
    clients: ClientState  # those of the cohort: leaves [M, ...]
    server: Any
    cohort: Array | None  # [M] int32, their numbers; None: all clients, in order
    pool: Pool | None  # as the cohort left it; None if all clients are in the cohort


class StepInfo(NamedTuple):
    """Step outputs. XLA removes those that the caller drops inside a jit."""

    loss: Array  # []
    top1: Array  # [], contrastive accuracy: the share of queries whose positive beats every key of the queue
    # [n, h, w, c] each, sent from the clients to the server. n is M * B, or the sum of the batch sizes if
    # they differ; twice that under the full symmetric loss. None if nothing was sent.
    smashed: SmashedData | None
    smashed_grad: Array | None  # [n, h, w, c], sent from the server to the clients; None if nothing was sent


class SyncInfo(NamedTuple):
    """Outputs of a synchronization."""

    divergence: Array  # [M], distance of each client from the mean: the sum over its tensors of the L2 norm


class Algorithm(NamedTuple):
    """An algorithm as pure functions. The caller jits them, donates the state and places it on devices.

    A cohort enters, takes steps, is synchronized and leaves:

        state = algorithm.enter(state, cohort)
        for views in ...:
            state, info = algorithm.step(state, views)
        state, _ = algorithm.sync(state)
        state = algorithm.leave(state)

    Donate the state of `step` and `sync`. What all clients share changes its shape as they enter and leave,
    so JAX warns that it cannot reuse all of the state that is donated to `enter` or `leave`.

    `cohort` [M] int32 holds the numbers of the clients that take part, without repetition. None means all
    clients of the pool, in order.

    `step` raises AssertionError if the views do not match the cohort, and ValueError if a queue is smaller
    than the keys of a step.
    """

    init: Callable[[Array], TrainState]  # rng -> state
    enter: Callable[..., CohortState]  # TrainState, cohort=None
    # CohortState, Views [M, B, H, W, 3]; `mocosfl` also takes send_gradients=True. With False the clients are
    # not trained.
    step: Callable[..., tuple[CohortState, StepInfo]]
    sync: Callable[[CohortState], tuple[CohortState, SyncInfo]]
    # Of an online model that all clients share, the pool keeps the mean over the cohort. So a cohort that
    # leaves unsynchronized is averaged.
    leave: Callable[[CohortState], TrainState]
    encode: Callable[[TrainState, Array], Features]  # state, images [n, H, W, 3] -> Features
    # CohortState, SmashedData of an earlier step of this cohort. Trains the server alone. None if the
    # algorithm cannot replay.
    replay: Callable[[CohortState, SmashedData], tuple[CohortState, StepInfo]] | None
