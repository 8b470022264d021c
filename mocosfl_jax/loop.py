"""The training loop: rounds, evaluation, metrics and checkpoints. It can stop and go on anywhere."""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from tqdm import tqdm

from mocosfl_jax import augment, checkpoint, evaluate, partition, plots, report, rounds, workdir
from mocosfl_jax.checkpoint import Progress
from mocosfl_jax.errors import NonFiniteError
from mocosfl_jax.experiment import Run
from mocosfl_jax.mocosfl import TrainState
from mocosfl_jax.models import Features

RAW_PIXELS_LIMIT = 2 * 2**30  # bytes of float images up to which raw pixels are evaluated


Encode = Callable[[TrainState, np.ndarray], Features]  # images [n, H, W, 3] uint8


class Programs(NamedTuple):
    """What is compiled."""

    run_steps: rounds.RunSteps
    sync: Callable[[TrainState, np.ndarray | None], TrainState]  # donates the state
    encode: Encode


class Logger(NamedTuple):
    """Where lines for a person and metrics for a program go."""

    line: Callable[[str], None]
    metrics: Callable[[workdir.Metrics], None]


def train(run: Run, folder: Path, stop: threading.Event, logger: Logger) -> int:
    """Train from the newest checkpoint in `folder`, or from the start.

    Args:
      run: of `experiment.prepare`.
      folder: the workdir, claimed; gets metrics.jsonl, checkpoints/ and plots.
      stop: once set, training ends after the current round, saved.
      logger: gets every line and every object of metrics.jsonl.

    Returns:
      The step reached: the last one of the run, unless `stop` came before.

    Raises:
      NonFiniteError: nothing was saved since.
      UserError: if checkpoints are there but none can be read.
    """
    rng_init, rng_views, rng_probe = jax.random.split(jax.random.key(run.config.seed), 3)
    state = jax.jit(run.algorithm.init)(rng_init)
    logger.line(report.header(run, state))
    encode = make_encode(run)
    with checkpoint.open_manager(folder / "checkpoints", run.config.checkpoint.keep) as manager:
        restored = checkpoint.restore_newest(manager, state)
        state, progress = restored or (state, Progress())
        if restored and progress.step < run.total_steps:
            logger.line(f"going on from step {progress.step:,} of {run.total_steps:,}")
        if progress.step < run.total_steps:
            workdir.rewind_metrics(folder, progress.metrics_lines)
            if not restored:
                progress = start(run, folder, state, encode, logger)
            programs = compile_programs(run, state, rng_views, encode)
            state, progress = run_epochs(run, programs, state, progress, folder, manager, stop, logger)
    plots.plot_curves(folder / "curves.png", workdir.read_metrics(folder))
    if progress.step == run.total_steps:
        finish(run, folder, state, encode, rng_probe, logger)
    return progress.step


def start(run: Run, folder: Path, state: TrainState, encode: Encode, logger: Logger) -> Progress:
    """What comes before the first step: how the deal looks, and how good no training is."""
    names = run.dataset.class_names
    plots.plot_partition(folder / "partition.png", run.dataset.y_train, run.parts, names)
    metrics = {"step": 0, "epoch": 0, **knn(run, *features(run, state, encode)), **knn_raw_pixels(run)}
    record(folder, metrics, logger)
    return Progress(best_knn=metrics["knn_backbone"], metrics_lines=1)


def compile_programs(run: Run, state: TrainState, rng_views: Array, encode: Encode) -> Programs:
    """Compile the step, the bulk of all compilation; the others compile when they are first used."""
    run_steps = rounds.make_run_steps(
        run.algorithm,
        run.make_views,
        rng_views,
        jax.device_put(run.dataset.x_train),
        state=state,
        batch_shape=(run.cohort, run.config.clients.batch_size),
        max_steps=run.steps_per_round,
        whole_pool=run.whole_pool,
        scan=rounds.scans_steps(jax.default_backend()),
    )
    return Programs(run_steps, jax.jit(run.algorithm.sync, donate_argnums=0), encode)


def run_epochs(
    run: Run,
    programs: Programs,
    state: TrainState,
    progress: Progress,
    folder: Path,
    manager: ocp.CheckpointManager,
    stop: threading.Event,
    logger: Logger,
) -> tuple[TrainState, Progress]:
    """Epochs until the last, or until `stop`; saved in either case."""
    config = run.config
    with tqdm(
        total=run.total_steps, initial=progress.step, unit="step", disable=None, dynamic_ncols=True
    ) as bar:
        while progress.step < run.total_steps and not stop.is_set():
            state, progress = run_epoch(run, programs, state, progress, stop, bar)
            if not bool(all_finite(state)):
                raise NonFiniteError(f"a parameter is not finite after step {progress.step:,}")
            epoch, rest = divmod(progress.step, run.steps_per_epoch)
            ended = epoch == config.total_epochs
            if rest == 0:
                metrics = epoch_metrics(run, progress, epoch)
                if ended or (config.eval.every and epoch % config.eval.every == 0):
                    metrics |= knn(run, *features(run, state, programs.encode))
                record(folder, metrics, logger)
                progress = progress._replace(
                    losses=(),
                    top1s=(),
                    epoch_seconds=0.0,
                    best_knn=max(progress.best_knn, metrics.get("knn_backbone", 0.0)),
                    metrics_lines=progress.metrics_lines + 1,
                )
            if ended or stop.is_set() or (rest == 0 and epoch % config.checkpoint.every == 0):
                checkpoint.save(manager, state, progress)
    manager.wait_until_finished()
    return state, progress


def run_epoch(
    run: Run, programs: Programs, state: TrainState, progress: Progress, stop: threading.Event, bar: tqdm
) -> tuple[TrainState, Progress]:
    """The rounds of one epoch, or those that are left of it; `stop` ends it after a round.

    The host fetches the losses of a round while the device works on the next one.
    """
    clients, seed = run.config.clients, run.config.seed
    epoch, done = divmod(progress.step, run.steps_per_epoch)
    members = partition.sample_cohort(clients.num, run.cohort, seed=seed, epoch=epoch)
    indices = partition.epoch_indices(
        run.parts, members, batch_size=clients.batch_size, steps=run.steps_per_epoch, seed=seed, epoch=epoch
    )
    cohort = None if run.whole_pool else members
    clock = time.perf_counter()
    pending: list[rounds.Curve] = []
    for first in range(done, run.steps_per_epoch, run.steps_per_round):
        state, curve = programs.run_steps(state, indices[first : first + run.steps_per_round], cohort)
        state = programs.sync(state, cohort)
        pending.append(curve)
        if stop.is_set():
            break
        if len(pending) > 1:
            progress = fetch(progress, pending.pop(0), clock, bar, run)
            clock = time.perf_counter()
    for curve in pending:
        progress = fetch(progress, curve, clock, bar, run)
        clock = time.perf_counter()
    return state, progress


def fetch(progress: Progress, curve: rounds.Curve, clock: float, bar: tqdm, run: Run) -> Progress:
    """`progress` with the losses of one more round, for which the host waits here."""
    losses, top1s = (np.asarray(jax.device_get(x), np.float64) for x in curve)
    if not np.isfinite(losses).all():
        step = progress.step + int(np.argmin(np.isfinite(losses))) + 1
        raise NonFiniteError(f"the loss of step {step:,} is {losses[step - progress.step - 1]}")
    seconds = time.perf_counter() - clock
    speed = len(losses) * run.images_per_step / seconds
    bar.update(len(losses))
    bar.set_postfix_str(f"loss {losses[-1]:.3f}, top1 {top1s[-1]:.2f}, {speed:,.0f} images/s")
    return progress._replace(
        step=progress.step + len(losses),
        losses=progress.losses + tuple(losses.tolist()),
        top1s=progress.top1s + tuple(top1s.tolist()),
        epoch_seconds=progress.epoch_seconds + seconds,
    )


@jax.jit
def all_finite(state: TrainState) -> Array:
    """Whether no floating-point number of `state` is nan or infinite."""
    floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floating]))


def epoch_metrics(run: Run, progress: Progress, epoch: int) -> dict[str, float]:
    """Means over the steps of the epoch that has ended, and its speed."""
    images = len(progress.losses) * run.images_per_step
    return {
        "step": progress.step,
        "epoch": epoch,
        "loss": float(np.mean(progress.losses)),
        "top1": float(np.mean(progress.top1s)),
        "images_per_s": round(images / progress.epoch_seconds, 1),
    }


def make_encode(run: Run) -> Encode:
    """The compiled encoder of un-augmented images."""
    dataset = run.dataset
    return jax.jit(
        lambda state, images: run.algorithm.encode(
            state, augment.normalise(images, dataset.mean, dataset.std)
        )
    )


def features(run: Run, state: TrainState, encode: Encode) -> tuple[Features, Features]:
    """Features of the training and of the test images."""
    encode_batch = partial(encode, state)
    return (
        evaluate.extract(encode_batch, run.dataset.x_train),
        evaluate.extract(encode_batch, run.dataset.x_test),
    )


def knn(run: Run, train: Features, test: Features) -> dict[str, float]:
    """kNN accuracies of one evaluation."""
    return {
        "knn_projection": knn_accuracy(run, train.projection, test.projection),
        "knn_backbone": knn_accuracy(run, train.backbone, test.backbone),
    }


def knn_raw_pixels(run: Run) -> dict[str, float]:
    """kNN accuracy of the normalised pixels themselves; nothing where they would fill the memory."""
    dataset = run.dataset
    if 4 * (dataset.x_train.size + dataset.x_test.size) > RAW_PIXELS_LIMIT:
        return {}
    train, test = (
        np.asarray(augment.normalise(x, dataset.mean, dataset.std)).reshape(len(x), -1)
        for x in (dataset.x_train, dataset.x_test)
    )
    return {"knn_raw_pixels": knn_accuracy(run, train, test)}


def knn_accuracy(run: Run, train: evaluate.Rows, test: evaluate.Rows) -> float:
    return evaluate.knn_accuracy(
        train,
        run.dataset.y_train,
        test,
        run.dataset.y_test,
        num_classes=len(run.dataset.class_names),
        k=run.config.eval.knn_k,
        temperature=run.config.eval.knn_temperature,
    )


def finish(
    run: Run, folder: Path, state: TrainState, encode: Encode, rng_probe: Array, logger: Logger
) -> None:
    """The linear probe, unless it is there already, and the closing summary."""
    lines = workdir.read_metrics(folder)
    if run.config.eval.probe_epochs and "linear_probe" not in lines[-1]:
        train, test = features(run, state, encode)
        probe = evaluate.linear_probe(
            rng_probe,
            train.backbone,
            run.dataset.y_train,
            test.backbone,
            run.dataset.y_test,
            num_classes=len(run.dataset.class_names),
            epochs=run.config.eval.probe_epochs,
        )
        metrics = {
            "step": run.total_steps,
            "epoch": run.config.total_epochs,
            "linear_probe": probe.last_epoch,
            "linear_probe_best_on_test": probe.best_on_test,
        }
        record(folder, metrics, logger)
    logger.line(report.summary(workdir.read_metrics(folder), folder))


def record(folder: Path, metrics: workdir.Metrics, logger: Logger) -> None:
    workdir.append_metrics(folder, metrics)
    logger.metrics(metrics)
    logger.line(report.metrics_line(metrics))
