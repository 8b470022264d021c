"""The interface of an algorithm: its state, its functions and their outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from mocosfl_jax.algorithm import clients
from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.models import Features


class TrainState(NamedTuple):
    """Everything that training changes. It holds arrays only, so it can be donated, sharded and saved."""

    step: Array  # [] int32, number of training steps taken
    clients: clients.ClientState
    server: Any  # `ServerState`; for the baseline FL-MoCo, the queues of the clients


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

    `cohort` [M] int32 holds the numbers of the clients that take part, without repetition. None means all
    clients of the pool, in order.

    `step` raises AssertionError if the views do not match the cohort, and ValueError if a queue is smaller
    than the keys of a step.
    """

    init: Callable[[Array], TrainState]  # rng -> state
    # state, Views [M, B, H, W, 3], cohort=None; `mocosfl` also takes send_gradients=True. With False the
    # clients are not trained.
    step: Callable[..., tuple[TrainState, StepInfo]]
    sync: Callable[..., tuple[TrainState, SyncInfo]]  # state, cohort=None
    encode: Callable[[TrainState, Array], Features]  # state, images [n, H, W, 3] -> Features
    # state, SmashedData of an earlier step, the cohort of that step=None. Trains the server alone. None if
    # the algorithm cannot replay.
    replay: Callable[..., tuple[TrainState, StepInfo]] | None
