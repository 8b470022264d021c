"""Clients and a server of a federation: in threads of one process, or each in a process of its own."""

import contextlib
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mocosfl_jax import certificates, serve
from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.programs import Programs
from mocosfl_jax.wire.hub import Hub, Rules, listening
from mocosfl_jax.wire.member import Access, take_part
from tests.support.processes import FIELDS, ROOT, free_port
from tests.support.small_run import write_images
from tests.support.toy import IMAGE, with_toy
from tests.support.training import prepare

LARGEST = 1 << 22  # bytes of a message


@contextlib.contextmanager
def hub_of(run: Run) -> Iterator[tuple[Hub, Access]]:
    """A server that listens without encryption, and how to reach it."""
    batch_size, size = int(run.batch_sizes[0]), run.dataset.x_train.shape[1]
    hub = Hub(Rules(run.config.clients.num, batch_size, size, authenticated=False), lambda line: None)
    with listening(hub, "127.0.0.1:0", None, LARGEST) as port:
        yield hub, Access(f"127.0.0.1:{port}", None, "cpu", patience=120.0)


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


def toy_fields(folder: pathlib.Path, epochs: int) -> dict[str, Any]:
    """Of a configuration for three clients with the toy network."""
    data = write_images(folder / "set.npz", IMAGE)
    given = FIELDS | {"data.dir": data, "epochs": epochs, "clients.num": 3, "clients.cohort": 3}
    return given | {"mesh.data": 1, "wire.deadline_s": 20.0}


class Federation:
    """A server and clients, each a process with a log.

    Attributes:
      arguments: of a command that has the same configuration and another workdir.
    """

    def __init__(self, folder: pathlib.Path, fields: Mapping[str, Any], *, toy: bool = True) -> None:
        self.folder = folder
        self.port = free_port()
        self.workdir = folder / "run"
        self.arguments = [f"--config.{name}={value}" for name, value in fields.items()]
        self.arguments = with_toy(["", *self.arguments])[1:] if toy else self.arguments
        config, *_ = serve.parse(["serve", *self.arguments, "--listen=127.0.0.1:1", "--insecure"])
        self.simulated = prepare(config)
        for client, part in enumerate(self.simulated.parts):
            np.savez(folder / f"{client}.npz", images=np.asarray(self.simulated.dataset.x_train[part]))
        self.tls = folder / "tls"
        count = f"--clients={config.clients.num}"
        assert certificates.main(["certificates", f"--tls={self.tls}", count]) == 0
        self.running: list[subprocess.Popen] = []

    def start(self, name: str, module: str, arguments: Sequence[str]) -> subprocess.Popen:
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdout=log, stderr=log, env=env, cwd=ROOT
            )
        self.running.append(process)
        return process

    def serve(self) -> subprocess.Popen:
        where = [f"--workdir={self.workdir}", f"--listen=127.0.0.1:{self.port}", f"--tls={self.tls}"]
        return self.start("serve", "mocosfl_jax.serve", [*self.arguments, *where])

    def join(self, client: int) -> subprocess.Popen:
        where = [f"--server=localhost:{self.port}", f"--tls={self.tls / f'client-{client}'}"]
        data = f"--data={self.folder / f'{client}.npz'}"
        return self.start(f"join-{client}", "mocosfl_jax.join", [*where, data, "--patience=60"])

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, condition: Callable[[], Any], seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.log("serve")
            time.sleep(0.02)

    def until_after(self, epoch: int, seconds: float) -> None:
        self.until(lambda: self.epochs() > epoch, seconds)

    def epochs(self) -> int:
        """How many epochs are in metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        return len(path.read_text().splitlines()) - 1 if path.exists() else -1
