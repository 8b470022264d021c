"""Two processes on this machine that share a run with the toy network."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
from typing import IO, NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]


EPOCHS = 12


FIELDS = {
    "epochs": EPOCHS,
    "data.name": "npz",
    "clients.num": 5,  # not evenly divisible by two devices
    "clients.cohort": 4,
    "clients.batch_size": 2,
    "clients.noniid_ratio": 1.0,
    "sync.frequency": 4,
    "moco.queue_size": 20,
    "eval.every": 6,
    "eval.knn_k": 3,
    "eval.probe_epochs": 2,
    "mesh.data": 2,
    "mesh.model": 1,
}


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def arguments(data: pathlib.Path, folder: pathlib.Path, *more: str) -> list[str]:
    fields = [f"--config.{name}={value}" for name, value in (FIELDS | {"data.dir": str(data)}).items()]
    return ["train", *fields, f"--workdir={folder}", *more]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Process(NamedTuple):
    """One of the two processes of a run with the toy network, with one CPU device."""

    running: subprocess.Popen
    out: pathlib.Path
    err: pathlib.Path
    copying: list[threading.Thread]

    def end(self, timeout: float = 120) -> Ended:
        self.running.wait(timeout)
        for stream in self.copying:
            stream.join(timeout)
        return Ended(self.running.returncode, self.out.read_text(), self.err.read_text())


def start(argv: list[str], logs: pathlib.Path, **settings: str) -> list[Process]:
    """Start both processes. Their output and the rows of the images they read go to files in `logs`."""
    port = free_port()
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "TOY_ROWS": str(logs)} | settings
    processes = []
    for i in range(2):
        where = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
        out, err = logs / f"out_{i}", logs / f"err_{i}"
        command = [sys.executable, "-m", "tests.support.toy_command", *argv[1:], *where]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=ROOT)
        copying = [copy(running.stdout, out), copy(running.stderr, err)]
        processes.append(Process(running, out, err, copying))
    return processes


def copy(stream: IO[bytes] | None, path: pathlib.Path) -> threading.Thread:
    """Copy the stream to a file until all its writers have closed it."""
    file = path.open("wb", buffering=0)

    def run() -> None:
        assert stream is not None
        with stream, file:
            for line in stream:
                file.write(line)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def ends(processes: list[Process]) -> list[Ended]:
    return [process.end() for process in processes]


def errors(ended: Ended) -> list[str]:
    return [line for line in ended.err.splitlines() if line.startswith("error: ")]


def newest(folder: pathlib.Path) -> int:
    return max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
