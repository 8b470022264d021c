"""Lines of metrics, for the screen, metrics.jsonl and TensorBoard."""

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
    say: Callable[[str], None]  # prints a line on the screen
    metrics: Callable[[workdir.Metrics], None]  # receives each line of metrics.jsonl
    writes: bool = True  # whether this process writes the run's files; all processes write checkpoints


def epoch_metrics(run: Run, progress: Progress, epoch: int, divergence: Array | None) -> dict[str, float]:
    """Return the metrics of the epoch that has just ended: means over its steps, speed and traffic.

    Args:
      run: the run.
      progress: holds the losses and the time of the epoch.
      epoch: number of epochs done.
      divergence: [M], from the last synchronization; None if there was none.

    Returns:
      The fields of a line of metrics.jsonl.
    """
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
        returns = traffic is Traffic.BOTH_WAYS and run.gradients_return
        metrics["smashed_down_bytes"] = one_way if returns else 0
    return metrics


def record(run: Run, progress: Progress, metrics: workdir.Metrics, output: Output) -> Progress:
    """Report and write one line of metrics, after any lines that could not be written before.

    Returns:
      The progress, with the number of lines written.

    Raises:
      DiskFullError: if the disk is full and the configuration says to stop then.
    """
    output.metrics(metrics)
    output.say(report.metrics_line(metrics))
    if not output.writes:
        return progress
    lines = (*progress.unwritten, dict(metrics))
    with continue_on_full_disk(run, output):
        workdir.append_metrics(output.folder, lines)
        return progress._replace(metrics_lines=progress.metrics_lines + len(lines), unwritten=())
    return progress._replace(unwritten=lines)


@contextlib.contextmanager
def continue_on_full_disk(run: Run, output: Output) -> Iterator[None]:
    """On a full disk, skip the rest of the block and report it, unless the configuration says to stop."""
    try:
        yield
    except DiskFullError as error:
        if run.config.checkpoint.on_full_disk == "stop":
            raise
        output.say(f"{error}; training continues, and saving resumes when there is room")
