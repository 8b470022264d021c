"""The interface of an algorithm: its states, its functions and their outputs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from jax import Array

from mocosfl_jax.algorithm.messages import SmashedData, Views
from mocosfl_jax.models import Features


class TrainState(NamedTuple):
    """Everything that training changes, while no cohort is training. This is what a checkpoint holds.

    States hold arrays only, so they can be donated and sharded. What `pool` and `server` are is up to the
    algorithm.
    """

    step: Array  # [] int32, number of training steps taken
    pool: Any  # the N clients: `Pool` in MocoSFL and FL-MoCo
    server: Any  # `ServerState` in MocoSFL; None in FL-MoCo, which has no server-side model


class CohortState(NamedTuple):
    """The state while a cohort is training. A step reads and writes all of it except the pool."""

    step: Array  # [] int32
    clients: Any  # those of the cohort: `ClientState` with leaves [M, ...] in MocoSFL and FL-MoCo
    server: Any
    cohort: Array | None  # [M] int32, their numbers; None: all clients, in order
    pool: Any  # as the cohort left it; None if all clients are in the cohort


State = TrainState | CohortState


@dataclasses.dataclass(frozen=True)
class Home:
    """Where a part of a state lives when several devices share the work."""

    kind: Literal["everywhere", "clients", "server", "queue"]
    count: int = 0  # of clients


# Typed as Any, since they stand in place of arrays.
EVERYWHERE: Any = Home("everywhere")  # a copy on every device
SERVER: Any = Home("server")  # parameters and the like: each tensor may be sharded, and is gathered for use
QUEUE: Any = Home("queue")  # rows of keys, which may be sharded


def of_clients(count: int) -> Any:
    """The home of leaves [count, ...]: each client's row is on the client's device."""
    return Home("clients", count)


class Models(NamedTuple):
    """The models of an algorithm, each as parameters of the client side and of the server side."""

    online: tuple[Any, Any]
    momentum: tuple[Any, Any]


class StepInfo(NamedTuple):
    """Step outputs. XLA removes those that the caller drops inside a jit."""

    loss: Array  # []
    # [], contrastive accuracy: the share of queries to which no key of the queue is more similar than their
    # positive; with the symmetric loss, of the second direction only. After a collapse it says nothing, since
    # rounding decides between equal similarities.
    top1: Array
    # [n, h, w, c] each, sent from the clients to the server. n is M * B, or the sum of the batch sizes if
    # they differ; twice that under the full symmetric loss. None if nothing was sent.
    smashed: SmashedData | None
    smashed_grad: Array | None  # [n, h, w, c], sent from the server to the clients; None if nothing was sent


class SyncInfo(NamedTuple):
    """Outputs of a synchronization."""

    divergence: Array  # [M], distance of each client from the mean: the sum over its tensors of the L2 norm


class Init(Protocol):
    """Makes the first state."""

    def __call__(self, rng: Array, models: Models | None = None) -> TrainState:
        """Draw all models from `rng`, or start from the given ones."""


class Enter(Protocol):
    """Lets a cohort enter training."""

    def __call__(
        self, state: TrainState, cohort: Array | np.ndarray | Sequence[int] | None = None
    ) -> CohortState:
        """Give the state on which the steps of the clients in `cohort` [M] work; None: all, in order.

        Raises:
          ValueError: If a number is not that of a client, or occurs twice. Inside a jit the numbers are not
            known: then, on one device, what a client from N on has of its own is NaN, and a negative number
            counts from the end.
          TypeError: If another cohort has not left yet.
        """


class Step(Protocol):
    """Takes one training step."""

    def __call__(self, state: CohortState, views: Views) -> tuple[CohortState, StepInfo]:
        """Train on views [M, B, H, W, 3] of the images of the cohort.

        Raises:
          ValueError: If the views do not match the cohort or are not floats, or a queue is smaller than the
            keys of one view.
          TypeError: If no cohort has entered.
        """


class Synchronize(Protocol):
    """Averages the client-side models of the cohort (FedAvg)."""

    def __call__(self, state: CohortState) -> tuple[CohortState, SyncInfo]:
        """Give all clients of the cohort the average of their models.

        Raises:
          TypeError: If no cohort has entered.
        """


class Leave(Protocol):
    """Lets the cohort return to the pool."""

    def __call__(self, state: CohortState) -> TrainState:
        """Give the state at rest.

        Of an online model that all clients share, the pool keeps the mean over the cohort. So a cohort that
        leaves unsynchronized is averaged.

        Raises:
          TypeError: If no cohort has entered.
        """


class Encode(Protocol):
    """Computes features with the online models."""

    def __call__(self, state: TrainState, images: Array) -> Features:
        """Encode normalised images [n, H, W, 3] without augmentation.

        Raises:
          ValueError: If the images are not floats.
          TypeError: If a cohort has not left yet.
        """


class TrainServer(Protocol):
    """Trains the server alone, on smashed data that it has kept or that arrives over a network."""

    def __call__(
        self, state: CohortState, smashed: SmashedData, arrived: Array | None = None
    ) -> tuple[CohortState, StepInfo]:
        """Train on concatenated smashed data [n, h, w, c] of this cohort.

        Args:
          state: The clients in it stay as they are.
          smashed: From both models of the clients.
          arrived: [n] bool, the rows that clients have sent; None: all.

        Returns:
          The new state, and among the outputs the gradient for the clients.
        """


class Replay(NamedTuple):
    """What an algorithm can do besides: the sides of the cut take their parts of a step separately.

    This saves communication (the official code's loss_threshold), and serves clients over a network.
    """

    keep: Step  # like `step`, but no gradients are sent back; the server can keep the smashed data
    train: TrainServer


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
    """

    init: Init
    enter: Enter
    step: Step
    sync: Synchronize
    leave: Leave
    encode: Encode
    # The models of a state at rest. The momentum model of the client side is the mean over the clients.
    models: Callable[[TrainState], Models]
    # State -> a `Home` for each part of it, as a prefix of the tree. Several devices and checkpoints use it.
    homes: Callable[[State], Any]
    replay: Replay | None = None  # None: the algorithm cannot replay smashed data
