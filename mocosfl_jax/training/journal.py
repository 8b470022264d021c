"""What a run writes down: lines of metrics for the screen, metrics.jsonl and TensorBoard."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax import Array

from mocosfl_jax.errors import DiskFullError
from mocosfl_jax.training import report, workdir
from mocosfl_jax.training.checkpoint import Progress
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.saving import Traffic


class Output(NamedTuple):
    """Where the results of a run go."""

    folder: Path  # the workdir, claimed: metrics.jsonl, checkpoints/ and plots
    say: Callable[[str], None]  # gets lines for a person
    metrics: Callable[[workdir.Metrics], None]  # gets what metrics.jsonl gets
    writes: bool = True  # the files of the run; with several processes one does, but for the checkpoints


def epoch_metrics(run: Run, progress: Progress, epoch: int, divergence: Array | None) -> dict[str, float]:
    """Means over the steps of the epoch that has ended, its speed, and what it sent."""
    images = len(progress.losses) * run.images_per_step
    metrics = {
        "step": progress.step,
        "epoch": epoch,
        "loss": float(np.mean(progress.losses)),
        "top1": float(np.mean(progress.top1s)),
        "images_per_s": round(images / progress.epoch_seconds, 1),
    }
    if divergence is not None:
        metrics["divergence"] = float(np.mean(divergence))
    if run.config.saving.loss_threshold:
        one_way = run.smashed.size * run.smashed.dtype.itemsize * len(progress.losses)
        traffic = Traffic(progress.traffic)
        metrics["smashed_up_bytes"] = 0 if traffic is Traffic.NONE else 2 * one_way
        metrics["smashed_down_bytes"] = one_way if traffic is Traffic.BOTH_WAYS else 0
    return metrics


def record(run: Run, progress: Progress, metrics: workdir.Metrics, output: Output) -> Progress:
    """Tell and write one line of metrics, after those that were not written before.

    Raises:
      DiskFullError: if the disk has no room, and the run is to stop then.
    """
    output.metrics(metrics)
    output.say(report.metrics_line(metrics))
    if not output.writes:
        return progress
    lines = (*progress.unwritten, dict(metrics))
    with going_on(run, output):
        workdir.append_metrics(output.folder, lines)
        return progress._replace(metrics_lines=progress.metrics_lines + len(lines), unwritten=())
    return progress._replace(unwritten=lines)


@contextlib.contextmanager
def going_on(run: Run, output: Output) -> Iterator[None]:
    """On a full disk, leave out what is within and say so, if the configuration wants to train on."""
    try:
        yield
    except DiskFullError as error:
        if run.config.checkpoint.on_full_disk == "stop":
            raise
        output.say(f"{error}; the run goes on, and saves again when there is room")
