"""The training loop: rounds, evaluation, metrics and checkpoints. It can stop and resume after any round."""

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array
from tqdm import tqdm

from mocosfl_jax.algorithm.interface import CohortState, TrainState
from mocosfl_jax.errors import CollapsedError, DiskFullError, NonFiniteError, UserError
from mocosfl_jax.evaluation import monitor
from mocosfl_jax.evaluation.features import Encode, make_encode
from mocosfl_jax.feed.batches import Feed
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.pictures.curves import plot_curves
from mocosfl_jax.pictures.features import plot_features
from mocosfl_jax.pictures.partition import plot_partition
from mocosfl_jax.runtime import compiler, hosts
from mocosfl_jax.runtime.waiting import waiting
from mocosfl_jax.training import (
    build,
    checkpoint,
    journal,
    report,
    resistance,
    rounds,
    saving,
    workdir,
)
from mocosfl_jax.training.checkpoint import Progress
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.initial import initial_models
from mocosfl_jax.training.journal import Output
from mocosfl_jax.training.programs import Programs, compile_programs
from mocosfl_jax.training.saving import Traffic

# Whether the run should stop. With several processes, each call returns the same on all of them.
Stop = Callable[[], bool]


# Metrics and state after an epoch -> whether training should save and end.
OnEpoch = Callable[[workdir.Metrics, TrainState], object]


class Outcome(NamedTuple):
    """The end of a call of `train`."""

    finished: (
        bool  # whether the run is finished, including its linear probe; if not, the same call resumes it
    )
    state: TrainState


# Run, state, key of all augmentations, `make_encode`'s function -> the compiled programs
MakePrograms = Callable[[Run, TrainState, Array, Encode], Programs]


def train(
    run: Run,
    stop: Stop,
    output: Output,
    on_epoch: OnEpoch | None = None,
    make_programs: MakePrograms = compile_programs,
) -> Outcome:
    """Train from the newest checkpoint in the workdir, or from the start.

    Args:
      run: from `experiment.prepare`.
      stop: once it returns True, training saves and ends after the current round.
      output: workdir and screen.
      on_epoch: called after each epoch and, with epoch 0, before the first one.
      make_programs: compiles the programs, those of simulated clients or of others.

    Returns:
      Whether the run is finished, and its state.

    Raises:
      NonFiniteError: if the loss or a parameter is not finite. The newest checkpoint is from an earlier step.
      CollapsedError: if the features have collapsed and `config.eval.stop_on_collapse` is set. The newest
        checkpoint is of the epoch after which that was noticed.
      DiskFullError: if the disk is full and the configuration says to stop then.
      UserError: if there are checkpoints but none can be read.
    """
    with jax.default_device(run.mesh.local_devices[0]):
        return _train(run, stop, output, on_epoch or (lambda metrics, state: False), make_programs)


def _train(
    run: Run, stop_asked: Stop, output: Output, on_epoch: OnEpoch, make_programs: MakePrograms
) -> Outcome:
    ended_early = collapsed = False

    def stop() -> bool:
        return ended_early or collapsed or stop_asked()

    def after_epoch(metrics: workdir.Metrics, state: TrainState) -> None:
        nonlocal ended_early, collapsed
        ended_early = bool(on_epoch(metrics, state))
        collapsed = run.config.eval.stop_on_collapse and bool(metrics.get("collapsed"))

    rng_init, rng_views, rng_probe = jax.random.split(jax.random.key(run.config.seed), 3)
    output.say(report.header(run))
    with waiting("compiling the initialization", shown=output.writes):
        options = compiler.options(meshes.platform(run.mesh))
        init: Any = jax.jit(run.algorithm.init).lower(rng_init).compile(compiler_options=options)
    dataset, folder = run.dataset, output.folder
    head = build.whole_head(run.config, run.model, run.algorithm, run.mesh)
    encode = make_encode(run.algorithm, dataset.mean, dataset.std, head)
    store = saving.Store(folder, run.replay)
    if run.config.saving.loss_threshold:
        store.require_space()
    with checkpoint.open_manager(folder / "checkpoints", run.config.checkpoint.keep) as manager:
        # Restored before anything is initialised, so that memory holds one state.
        restored = checkpoint.restore_newest(manager, rounds.outputs(init), run.algorithm.homes)
        models = initial_models(run, rng_init) if restored is None else None
        state, progress = restored or (
            init(rng_init) if models is None else jax.jit(run.algorithm.init)(rng_init, models),
            Progress(),
        )
        if progress.step > run.total_steps:
            raise UserError(
                f"{folder}: found a checkpoint of step {progress.step:,}, allowed: at most "
                f"{run.total_steps:,}, the steps of the run on these data"
            )
        ended = progress.step == run.total_steps
        # Only the line of the linear probe follows the last checkpoint. It may stay.
        with hosts.together():
            if output.writes:
                workdir.rewind_metrics(folder, progress.metrics_lines, optional=int(ended))
        if output.writes and not workdir.has_preprocessing(folder):
            preprocessing = workdir.Preprocessing(dataset.x_train.shape[1], dataset.mean, dataset.std)
            workdir.write_preprocessing(folder, preprocessing)
        if restored is None:
            progress = start(run, state, encode, output, after_epoch)
            save(run, manager, state, progress, output)
        elif not ended:
            output.say(f"resuming from step {progress.step:,} of {run.total_steps:,}")
        features = None
        if not ended and not stop():
            clock = time.perf_counter()
            with waiting("compiling the training step", shown=output.writes):
                programs = make_programs(run, state, rng_views, encode)
            output.say(f"compiled the step in {time.perf_counter() - clock:.1f} s")
            state, progress, features = run_epochs(
                run, programs, state, progress, store, manager, stop, output, after_epoch
            )
    if output.writes:
        plot_curves(folder / "curves.png", workdir.read_metrics(folder))
    if progress.step < run.total_steps or (features and stop()):
        output.say(f"saved at step {progress.step:,} of {run.total_steps:,}")
        if collapsed:
            raise CollapsedError("the features have collapsed, and config.eval.stop_on_collapse is True")
        return Outcome(False, state)
    finish(run, progress, features or monitor.features(run.dataset, state, encode), rng_probe, output)
    return Outcome(True, state)


def start(
    run: Run,
    state: TrainState,
    encode: Encode,
    output: Output,
    after_epoch: Callable[[workdir.Metrics, TrainState], None],
) -> Progress:
    """Plot the partition, and record the accuracies of the untrained network."""
    names = run.dataset.class_names
    if output.writes and run.simulated:
        plot_partition(output.folder / "partition.png", run.dataset.y_train, run.parts, names)
    with waiting("evaluating the network before training", shown=output.writes):
        metrics = {
            "step": 0,
            "epoch": 0,
            **monitor.knn(run.dataset, run.config.eval, monitor.features(run.dataset, state, encode)),
            **monitor.knn_raw_pixels(run.dataset, run.config.eval),
        }
    progress = journal.record(run, Progress(), metrics, output)
    after_epoch(metrics, state)
    return progress


def run_epochs(
    run: Run,
    programs: Programs,
    state: TrainState,
    progress: Progress,
    store: saving.Store,
    manager: ocp.CheckpointManager,
    stop: Stop,
    output: Output,
    after_epoch: Callable[[workdir.Metrics, TrainState], None],
) -> tuple[TrainState, Progress, monitor.Evaluated | None]:
    """Train until the last epoch or until `stop`, and save in either case.

    Returns:
      State, progress and, if the run is at its end, the features of the last evaluation.
    """
    config = run.config
    features = None
    few = monitor.few(run.dataset)
    reported = False
    with tqdm(
        total=run.total_steps,
        initial=progress.step,
        unit="step",
        disable=None if output.writes else True,
        dynamic_ncols=True,
    ) as bar:
        while progress.step < run.total_steps and not stop():
            state, progress, divergence = run_epoch(run, programs, state, progress, store, stop, bar)
            if not bool(all_finite(state)):
                raise NonFiniteError(f"a parameter is not finite after step {progress.step:,}")
            epoch, rest = divmod(progress.step, run.steps_per_epoch)
            ended = epoch == config.total_epochs
            if rest == 0:
                metrics = journal.epoch_metrics(run, progress, epoch, divergence)
                metrics |= monitor.collapsed(few, state, programs.encode)
                metrics |= resistance.metrics(run, state, epoch, output.say)
                if ended or (config.eval.every and epoch % config.eval.every == 0):
                    features = monitor.features(run.dataset, state, programs.encode)
                    metrics |= monitor.knn(run.dataset, run.config.eval, features)
                    features = features if ended else None  # they take much memory
                progress = journal.record(run, progress, metrics, output)._replace(
                    traffic=next_traffic(run, progress, metrics["loss"], epoch),
                    last_loss=metrics["loss"],
                    losses=(),
                    top1s=(),
                    epoch_seconds=0.0,
                )
                after_epoch(metrics, state)
                if metrics.get("collapsed") and not reported:
                    output.say(report.collapse_line(run.config, metrics))
                    reported = True
            # The next epoch overwrites the smashed data that an older checkpoint would replay.
            replaces = rest == 0 and progress.traffic == Traffic.UP_ONLY
            if replaces:
                checkpoint.save(manager, state, progress)
                checkpoint.finish(manager)
            elif rest == 0 and epoch % config.checkpoint.every == 0:
                save(run, manager, state, progress, output)
    with contextlib.suppress(DiskFullError):  # reported below, if there is still no room
        checkpoint.finish(manager)
    if manager.latest_step() != progress.step:
        checkpoint.save(manager, state, progress)
        checkpoint.finish(manager)
    return state, progress, features if progress.step == run.total_steps else None


def run_epoch(
    run: Run,
    programs: Programs,
    state: TrainState,
    progress: Progress,
    store: saving.Store,
    stop: Stop,
    bar: tqdm,
) -> tuple[TrainState, Progress, Array | None]:
    """Train the remaining rounds of one epoch with its cohort; `stop` ends it after a round.

    The host fetches the losses of a round while the device works on the next one.

    Returns:
      State, progress, and the divergence of the clients at the last synchronization, [M], if there was one.
    """
    epoch, done = divmod(progress.step, run.steps_per_epoch)
    traffic = Traffic(progress.traffic)
    if traffic is Traffic.UP_ONLY:
        progress = progress._replace(kept_epoch=epoch)
    members = run.members(progress.kept_epoch if traffic is Traffic.NONE else epoch)
    at_work = programs.turn.enter(state, None if run.whole_pool else members)
    order = np.random.default_rng((run.config.seed, epoch)).permutation(run.steps_per_epoch)  # for a replay
    clock = time.perf_counter()
    pending: list[rounds.Curve] = []
    divergence = None
    for first in range(done, run.steps_per_epoch, run.steps_per_round):
        steps = range(first, min(first + run.steps_per_round, run.steps_per_epoch))
        if traffic is Traffic.BOTH_WAYS or programs.replaying is None:
            at_work, curve = programs.run_steps(at_work, programs.feed(epoch, steps))
            at_work, info = programs.turn.sync(at_work)
            divergence = info.divergence
        elif traffic is Traffic.UP_ONLY:
            at_work, curve = keep(programs.replaying, programs.feed, store, epoch, at_work, steps)
        else:
            kept = order[steps.start : steps.stop]
            at_work, curve = replay(programs.replaying, store, progress.kept_epoch, at_work, kept)
        pending.append(curve)
        if stop():
            break
        if len(pending) > 1:
            progress = fetch(progress, pending.pop(0), clock, bar, run)
            clock = time.perf_counter()
    for curve in pending:
        progress = fetch(progress, curve, clock, bar, run)
        clock = time.perf_counter()
    return programs.turn.leave(at_work), progress, divergence


def keep(
    replaying: rounds.Replaying,
    feed: Feed,
    store: saving.Store,
    epoch: int,
    state: CohortState,
    steps: range,
) -> tuple[CohortState, rounds.Curve]:
    """Train the server alone, and keep the smashed data that the clients send."""
    curves = []
    images = (batch for piece in feed(epoch, steps) for batch in piece)
    for step, batch in zip(steps, images, strict=True):
        state, curve, smashed = replaying.keep(state, batch)
        store.write(epoch, step, smashed)
        curves.append(curve)
    return state, rounds.joined(curves)


def replay(
    replaying: rounds.Replaying, store: saving.Store, epoch: int, state: CohortState, steps: np.ndarray
) -> tuple[CohortState, rounds.Curve]:
    """Train the server on the smashed data kept from `steps` of `epoch`."""
    curves = []
    for step in steps:
        state, curve = replaying.train(state, store.read(epoch, int(step)))
        curves.append(curve)
    return state, rounds.joined(curves)


def fetch(progress: Progress, curve: rounds.Curve, clock: float, bar: tqdm, run: Run) -> Progress:
    """Wait for the losses of one more round and add them to `progress`."""
    losses, top1s = (np.concatenate(jax.device_get(x)).astype(np.float64) for x in curve)
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
    """Return whether all floating-point numbers of `state` are finite.

    Example:
      >>> bool(all_finite({"kernel": jnp.array([1.0, jnp.inf])}))
      False
    """
    floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floating]))


def next_traffic(run: Run, progress: Progress, loss: float, epoch: int) -> str:
    """Return the traffic of the next epoch, given the mean loss of the epoch that has just ended."""
    return saving.next_traffic(
        Traffic(progress.traffic),
        loss,
        progress.last_loss,
        epoch=epoch,
        threshold=run.config.saving.loss_threshold,
        warmup_epochs=run.config.saving.warmup_epochs,
    )


def finish(
    run: Run, progress: Progress, features: monitor.Evaluated, rng_probe: Array, output: Output
) -> None:
    """Record the linear probe, unless it is recorded already, draw the features and print the summary."""
    probed = output.writes and any("linear_probe" in line for line in workdir.read_metrics(output.folder))
    # All processes compute the probe, so that none waits for another.
    if run.config.eval.probe_epochs and not any(hosts.of_first([probed])):
        end = {"step": run.total_steps, "epoch": run.config.total_epochs}
        progress = journal.record(
            run,
            progress,
            end | monitor.linear_probe(run.dataset, run.config.eval, features, rng_probe),
            output,
        )
    if output.writes:
        if progress.unwritten:
            workdir.append_metrics(output.folder, progress.unwritten)
        plot_features(output.folder, run.dataset, features)
        start = report.before_training(run.config.init_from)
        output.say(report.summary(workdir.read_metrics(output.folder), output.folder, start))


def save(
    run: Run, manager: ocp.CheckpointManager, state: TrainState, progress: Progress, output: Output
) -> None:
    """Save in the background.

    Raises:
      DiskFullError: if the disk is full and the configuration says to stop then.
    """
    with journal.continue_on_full_disk(run, output):
        checkpoint.finish(manager)
    with journal.continue_on_full_disk(run, output):
        checkpoint.save(manager, state, progress)
