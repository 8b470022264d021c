"""A whole run from Python: prepare, claim the workdir, train or resume, and return what was learned."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.config import Config, resolve
from mocosfl_jax.models import SplitModel
from mocosfl_jax.parallel import mesh as meshes
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.runtime import hosts
from mocosfl_jax.runtime.environment import environment
from mocosfl_jax.training import experiment, loop
from mocosfl_jax.training import workdir as workdirs
from mocosfl_jax.training.build import MakeAlgorithm, network_record, online_models
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.journal import Output
from mocosfl_jax.weights.encoder_file import Encoder, Metadata


class Trained(NamedTuple):
    """What `run` returns."""

    metrics: list[workdirs.Metrics]  # the lines of metrics.jsonl
    encoder: Encoder  # the online models, as `load_encoder` returns them
    state: TrainState  # on the mesh; with several devices, clients may be padded with zeros
    finished: bool  # whether the last epoch and the linear probe are done; if not, the same call resumes


def run(
    config: Config,
    workdir: Path | str,
    *,
    on_epoch: loop.OnEpoch | None = None,
    model: SplitModel | None = None,
    algorithm: MakeAlgorithm | None = None,
    devices: Sequence[jax.Device] | None = None,
    say: Callable[[str], None] = print,
    accept_other_data: bool = False,
) -> Trained:
    """Train as `python -m mocosfl_jax.train` does, and resume if the workdir holds the run.

    Call `runtime.compiler.set_up()` before JAX's first operation to get the command's flags and devices on a
    CPU. Signals are left to you: SIGTERM does not save, but `on_epoch` can end the training.

    Example:

        config = Config(data=Data(name="cifar10"), clients=Clients(num=20))
        trained = run(config, "runs/first", on_epoch=lambda metrics, state: print(metrics))
        trained.metrics[-1]["linear_probe"]

    Args:
      config: the configuration.
      workdir: the folder for checkpoints, metrics and plots.
      on_epoch: called with the metrics and the state after each epoch and, with epoch 0, before the first
        one. The state is valid during the call only, as the next epoch overwrites it; keep a copy, such as
        that of `jax.device_get`. If it returns a true value, training saves and ends; the same call would go
        on. With several processes it must return the same on all of them.
      model: a network of your own; None: that of the configuration.
      algorithm: a function like `config.own.algorithm`; None: that of the configuration.
      devices: the devices to use; None: all.
      say: prints a line of the report.
      accept_other_data: resume even if the data set has changed.

    Returns:
      Metrics, encoder and state.

    Raises:
      UserError: if the configuration or the data is impossible, or the workdir holds another run.
      NonFiniteError: if the loss or a parameter is not finite.
      CollapsedError: if the features have collapsed and `config.eval.stop_on_collapse` is set.
      DiskFullError: if the disk is full and the configuration says to stop then.
    """
    folder = utf8_path("workdir", str(workdir))
    resolved = resolve(config)
    with hosts.together():
        mesh = meshes.make_mesh(resolved.mesh, jax.devices() if devices is None else devices)
        prepared = experiment.prepare(
            resolved,
            mesh,
            model=model,
            algorithm=algorithm,
            preprocessing=workdirs.preprocessing_of_trained(folder),
        )
    report = say if hosts.first() else lambda line: None
    with contextlib.ExitStack() as stack:
        with hosts.together():
            if hosts.first():
                stack.enter_context(claimed(prepared, folder, report, accept_other_data=accept_other_data))
        output = Output(folder, report, lambda metrics: None, hosts.first())
        outcome = loop.train(prepared, lambda: False, output, on_epoch)
    return Trained(
        workdirs.read_metrics(folder), encoder_of(prepared, outcome.state), outcome.state, outcome.finished
    )


def encoder_of(run: Run, state: TrainState) -> Encoder:
    """Return the online models of a state, as `load_encoder` returns them."""
    record = network_record(run.config, run.dataset.x_train.shape[1])
    metadata = Metadata(record, run.dataset.mean, run.dataset.std, f"step {int(state.step):,} of a run")
    return Encoder(run.model, online_models(run.algorithm, state), metadata)


@contextlib.contextmanager
def claimed(
    run: Run, folder: Path, report: Callable[[str], None], *, accept_other_data: bool
) -> Iterator[None]:
    """Lock the workdir `folder`, and write its config.json or compare it with that of `run`.

    What differs from the run that the folder held is reported.

    Raises:
      UserError: as `workdir.locked` and `workdir.claim` do.
    """
    with workdirs.locked(folder):
        claim = workdirs.claim(
            folder,
            run.config,
            environment(meshes.first_device(run.mesh), run.mesh.shape),
            run.fingerprint,
            accept_other_data=accept_other_data,
            real_clients=not run.simulated,
        )
        if claim.emptied:
            report(f"{folder}: held a run of which no step was trained; it makes way for this one")
        if claim.environment:
            report(
                f"{folder}: the run started in another environment, so results may not be those of an "
                f"undisturbed run: {'; '.join(claim.environment)}"
            )
        yield
