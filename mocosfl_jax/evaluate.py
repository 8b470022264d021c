"""Evaluate a checkpoint of a run: kNN and linear probe, with few labels too.

    python -m mocosfl_jax.evaluate --workdir=FOLDER [--checkpoint=STEP] [--probe_epochs=N] [--semi_supervised]

  --workdir=FOLDER     of a run of mocosfl_jax.train, finished or not
  --checkpoint=STEP    a number in FOLDER/checkpoints; the newest by default
  --probe_epochs=N     of the linear probe and the semi-supervised classifiers, 0: none of them; by default
                       the run's config.eval.probe_epochs
  --semi_supervised    also train a small network on the features with 10 % and with 1 % of the labels

Prints the accuracies and writes them to FOLDER/evaluation.json. Nothing else in the folder changes. The data
set has to be where the run found it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.errors import UserError
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import workdir

USAGE = "--workdir=FOLDER, --checkpoint=STEP, --probe_epochs=N, --semi_supervised, --help"


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit status, as `commandline.answer` has it."""
    return commandline.answer(argv, __doc__ or "", evaluate)


def evaluate(argv: Sequence[str]) -> None:
    """Evaluate as the command line says.

    Raises:
      UserError: for a mistake in it, and for a folder that holds no run.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_integer("checkpoint", None, "Its training step.", flag_values=values)
        flags.DEFINE_integer("probe_epochs", None, "Of the probes.", lower_bound=0, flag_values=values)
        flags.DEFINE_bool("semi_supervised", False, "Also with few labels.", flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define, required=["workdir"])
    folder = Path(values.workdir)
    config = workdir.read_config(folder)
    if values.probe_epochs is not None:
        config.eval.probe_epochs = values.probe_epochs
    if values.semi_supervised and not config.eval.probe_epochs:
        raise UserError("--probe_epochs: found 0, allowed: 1 or more with --semi_supervised")

    compiler.set_up()
    # Imported only here, so that a slip of the pen is answered at once.
    from mocosfl_jax.evaluation import monitor
    from mocosfl_jax.evaluation.features import make_encode
    from mocosfl_jax.parallel.mesh import one_device
    from mocosfl_jax.training import checkpoint, experiment, report

    device = jax.devices()[0]
    run = experiment.prepare(config, one_device(device))
    state, progress = checkpoint.restore(
        folder / "checkpoints", values.checkpoint, run.algorithm.init, device
    )
    epoch = progress.step / run.steps_per_epoch
    say(f"{folder}: checkpoint {progress.step:,}, epoch {epoch:g} of {run.config.total_epochs:,}")
    encode = make_encode(run.algorithm, run.dataset.mean, run.dataset.std)
    features = monitor.features(run.dataset, state, encode)
    numbers = monitor.knn(run.dataset, run.config.eval, features) | monitor.knn_raw_pixels(
        run.dataset, run.config.eval
    )
    # The training's own, so that the numbers of the last checkpoint are those in metrics.jsonl.
    _, _, rng_probe = jax.random.split(jax.random.key(config.seed), 3)
    if config.eval.probe_epochs:
        numbers |= monitor.linear_probe(run.dataset, run.config.eval, features, rng_probe)
    if values.semi_supervised:
        numbers |= monitor.semi_supervised(run.dataset, run.config.eval, features, rng_probe)
    untrained = workdir.read_metrics(folder, 1)
    say(report.accuracies(numbers, untrained[0] if untrained else {}))
    settings = {name: getattr(config.eval, name) for name in ("knn_k", "knn_temperature", "probe_epochs")}
    workdir.write_evaluation(folder, {"step": progress.step, "epoch": epoch, **settings, **numbers})
    say(f"{folder}: evaluation.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
