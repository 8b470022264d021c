"""What an algorithm is: its state, its functions and what they return."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from mocosfl_jax.algorithm import clients
from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.models import Features


class TrainState(NamedTuple):
    """All that training changes. Arrays only, so that it can be donated, sharded, saved and compared."""

    step: Array  # [] int32, training steps done
    clients: clients.ClientState
    server: Any  # ServerState; of the baseline FL-MoCo, the clients' queues


class StepInfo(NamedTuple):
    """What a step has to tell. What the caller drops inside a jit is not kept."""

    loss: Array  # []
    top1: Array  # [], contrastive accuracy: share of queries whose positive beats the queue
    # [n, h, w, c] each: what crossed the cut upwards. n = M * B, or the sum of the batches where they differ;
    # twice as many under the full symmetric loss
    smashed: SmashedData | None
    smashed_grad: Array | None  # [n, h, w, c], what crossed it downwards; None: nothing did


class SyncInfo(NamedTuple):
    divergence: Array  # [M], how far each client was from the mean: summed L2 norms of its tensors


class Algorithm(NamedTuple):
    """Pure functions; jit, donation and placement are the caller's.

    `cohort` [M] int32 are the clients that take part, distinct; None means the whole pool in order.
    `step` raises AssertionError if views and cohort do not fit together, and ValueError if a queue is
    smaller than the keys of a step.
    """

    init: Callable[[Array], TrainState]  # rng -> state
    # state, Views [M, B, H, W, 3], cohort=None; of mocosfl also send_gradients=True (False: clients rest)
    step: Callable[..., tuple[TrainState, StepInfo]]
    sync: Callable[..., tuple[TrainState, SyncInfo]]  # state, cohort=None
    encode: Callable[[TrainState, Array], Features]  # state, images [n, H, W, 3] -> Features
    # state, SmashedData of an earlier step, its cohort=None: a step of the server alone
    replay: Callable[..., tuple[TrainState, StepInfo]] | None
