"""An epoch of a narrow network in the real training loop, and the part of it outside the compiled step.

The compiled step gathers images, augments them and trains. Outside it, the host draws the batches,
synchronizes, fetches the losses and writes logs. outside_share is an upper bound: the benchmark waits for
every round of steps, whereas in training the host works while the device does. Evaluation and checkpoints,
which an epoch may include, are measured separately.

Last results: two cores of an AMD EPYC, jax 0.10.2, torch 2.13.0, 2026-11-23, --repeats=3

                ours_s  steps_s  outside_share  images_per_s  checkpoint_s  evaluation_s
    narrow       11.25    11.18       0.005601         533.4        0.5234         1.134
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median

import jax
from tqdm import tqdm

from benchmarks import settings
from benchmarks.results import Result
from mocosfl_jax.algorithm.interface import CohortState
from mocosfl_jax.config import Config
from mocosfl_jax.evaluation import monitor
from mocosfl_jax.training import checkpoint, journal, loop, rounds, saving
from mocosfl_jax.training.checkpoint import Progress

NEEDS = ()


def measure(config: Config, case: str, epochs: int) -> Result:
    """Medians over `epochs` epochs, after a warm-up epoch."""
    config.epochs = epochs + 1
    run, state, compiled = settings.prepare(config)
    inside = [0.0]

    def run_steps(state: CohortState, images: Iterable[jax.Array]) -> tuple[CohortState, rounds.Curve]:
        start = time.perf_counter()
        out = jax.block_until_ready(compiled.run_steps(state, images))
        inside[0] += time.perf_counter() - start
        return out

    programs = compiled._replace(run_steps=run_steps)
    progress = Progress()
    times: list[tuple[float, float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=True) as bar:
        output = journal.Output(Path(folder), lambda line: None, lambda metrics: None)
        store = saving.Store(Path(folder), run.replay)  # never written to
        with checkpoint.open_manager(Path(folder) / "checkpoints", 1) as manager:
            for epoch in range(1, epochs + 2):
                inside[0], start = 0.0, time.perf_counter()
                state, progress, divergence = loop.run_epoch(
                    run, programs, state, progress, store, lambda: False, bar
                )
                assert bool(loop.all_finite(state))
                journal.record(run, progress, journal.epoch_metrics(run, progress, epoch, divergence), output)
                whole = time.perf_counter() - start
                progress = progress._replace(losses=(), top1s=(), epoch_seconds=0.0)
                checkpoint.save(manager, state, progress)
                manager.wait_until_finished()
                saved = time.perf_counter() - start
                monitor.knn(
                    run.dataset, run.config.eval, monitor.features(run.dataset, state, compiled.encode)
                )
                evaluated = time.perf_counter() - start
                times.append((whole, inside[0], saved - whole, evaluated - saved))
    whole, step, save, evaluation = (median(each) for each in zip(*times[1:], strict=True))
    numbers = {
        "ours_s": whole,
        "steps_s": step,
        "outside_share": median(1 - step / whole for whole, step, _, _ in times[1:]),
        "images_per_s": run.steps_per_epoch * run.images_per_step / whole,
        "checkpoint_s": save,
        "evaluation_s": evaluation,
    }
    return Result("epoch", case, numbers)


def results(repeats: int) -> Iterator[Result]:
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results only
        measured = measure(settings.narrow_run(), "narrow", repeats)
    yield measured
