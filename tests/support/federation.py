"""Clients and a server of a federation, in threads of one process."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.programs import Programs
from mocosfl_jax.wire.hub import Hub, Rules, listening
from mocosfl_jax.wire.member import Access, take_part

LARGEST = 1 << 22  # bytes of a message


@contextlib.contextmanager
def hub_of(run: Run) -> Iterator[tuple[Hub, Access]]:
    """A server that listens without encryption, and how to reach it."""
    batch_size, size = int(run.batch_sizes[0]), run.dataset.x_train.shape[1]
    hub = Hub(Rules(run.config.clients.num, batch_size, size, authenticated=False), lambda line: None)
    with listening(hub, "127.0.0.1:0", None, LARGEST) as port:
        yield hub, Access(f"127.0.0.1:{port}", None, patience=30.0)


def joined(
    access: Access, images: Sequence[np.ndarray], say: Callable[[str], None] = lambda line: None
) -> list[threading.Thread]:
    """Start a client for each of the given images [n, H, W, 3]."""
    x64 = jax.config.values["jax_enable_x64"]

    def client(number: int) -> None:
        with jax.enable_x64(x64):  # a setting of each thread
            take_part(access, lambda size: images[number], number, say)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(len(images))]
    for thread in threads:
        thread.start()
    return threads


def train(programs: Programs, run: Run, state: TrainState, epochs: int) -> tuple[TrainState, list[float]]:
    """Train as the training loop does: the state and the losses of all steps."""
    losses: list[Any] = []
    for epoch in range(epochs):
        at_work = programs.turn.enter(state, None if run.whole_pool else run.members(epoch))
        for first in range(0, run.steps_per_epoch, run.steps_per_round):
            steps = range(first, min(first + run.steps_per_round, run.steps_per_epoch))
            at_work, curve = programs.run_steps(at_work, programs.feed(epoch, steps))
            losses += [jax.device_get(loss) for loss in curve.loss]
            at_work, _ = programs.turn.sync(at_work)
        state = programs.turn.leave(at_work)
    return state, np.concatenate(losses).tolist()
