"""Training in this process, stopped where a test wants it."""

import pathlib
import threading
from collections.abc import Callable, Mapping

from mocosfl_jax.training import loop, workdir
from mocosfl_jax.training.experiment import Run

Metrics = Mapping[str, float]


def train(run: Run, folder: pathlib.Path, stop_at: Callable[[Metrics], bool] = lambda metrics: False) -> bool:
    """Train, and stop after the first line of metrics for which `stop_at` holds."""
    workdir.claim(folder, run.config, {})
    stop = threading.Event()

    def watch(metrics: Metrics) -> None:
        if stop_at(metrics):
            stop.set()

    return loop.train(run, stop.is_set, loop.Output(folder, lambda line: None, watch))


def comparable(folder: pathlib.Path) -> list[dict[str, float]]:
    return [{k: v for k, v in m.items() if k != "images_per_s"} for m in workdir.read_metrics(folder)]
