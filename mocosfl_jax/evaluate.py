"""Evaluate a checkpoint of a run: kNN, a linear probe and, on request, classifiers trained on few labels.

    python -m mocosfl_jax.evaluate --workdir=FOLDER [--checkpoint=STEP] [--probe_epochs=N] [--semi_supervised]
                                   [--data_dir=FOLDER] [--accept_other_data]

  --workdir=FOLDER     the folder of a run of mocosfl_jax.train, finished or not
  --checkpoint=STEP    a number in FOLDER/checkpoints; default: the newest
  --probe_epochs=N     epochs of the linear probe and the semi-supervised classifiers, 0 to skip them;
                       default: config.eval.probe_epochs of the run
  --semi_supervised    also train a small network on the features with 10 % and with 1 % of the labels
  --data_dir=FOLDER    where the data set is now; default: config.data.dir of the run
  --accept_other_data  evaluate on the data set even if it is not the one that the run was trained on

Prints the accuracies and writes them to FOLDER/evaluation.json. Nothing else in the folder changes.
Nothing is downloaded: a data set that is missing is reported.
"""

import sys
from collections.abc import Sequence

import jax
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.data import download
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import workdir

USAGE = (
    "--workdir=FOLDER, --config=FILE, --checkpoint=STEP, --probe_epochs=N, --semi_supervised, "
    "--data_dir=FOLDER, --accept_other_data, --help"
)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit status, see `commandline.answer`."""
    return commandline.answer(argv, __doc__ or "", evaluate)


def evaluate(argv: Sequence[str]) -> None:
    """Evaluate as requested on the command line.

    Raises:
      UserError: if an argument is wrong, or the folder does not hold a run.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_string("config", None, "File with the run's own functions.", flag_values=values)
        flags.DEFINE_integer("checkpoint", None, "Training step of the checkpoint.", flag_values=values)
        flags.DEFINE_integer("probe_epochs", None, "Epochs of the probes.", lower_bound=0, flag_values=values)
        flags.DEFINE_bool("semi_supervised", False, "Also with few labels.", flag_values=values)
        flags.DEFINE_string("data_dir", None, "Folder of the data set.", flag_values=values)
        flags.DEFINE_bool("accept_other_data", False, "Evaluate on other data.", flag_values=values)

    values = commandline.parse_flags(argv, USAGE, define, required=["workdir"])
    folder = utf8_path("--workdir", values.workdir)
    config = workdir.read_config(folder, commandline.own_functions(values.config))
    if values.probe_epochs is not None:
        config.eval.probe_epochs = values.probe_epochs
    if values.data_dir is not None:
        config.data.dir = values.data_dir
    if values.semi_supervised and not config.eval.probe_epochs:
        raise UserError("--probe_epochs: found 0, allowed: 1 or more with --semi_supervised")

    compiler.set_up()
    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.evaluation import monitor
    from mocosfl_jax.evaluation.features import make_encode
    from mocosfl_jax.parallel.mesh import one_device
    from mocosfl_jax.training import checkpoint, experiment, report
    from mocosfl_jax.training.build import whole_head

    device = jax.devices()[0]
    with download.forbidden():
        run = experiment.prepare(config, one_device(device))
    if not values.accept_other_data:
        workdir.require_same_data(folder, run.fingerprint)
    state, progress = checkpoint.restore(folder / "checkpoints", values.checkpoint, run.algorithm, device)
    epoch = progress.step / run.steps_per_epoch
    say(f"{folder}: checkpoint {progress.step:,}, epoch {epoch:g} of {run.config.total_epochs:,}")
    head = whole_head(config, run.model, run.algorithm, run.mesh)
    encode = make_encode(run.algorithm, run.dataset.mean, run.dataset.std, head)
    features = monitor.features(run.dataset, state, encode)
    numbers = monitor.knn(run.dataset, run.config.eval, features) | monitor.knn_raw_pixels(
        run.dataset, run.config.eval
    )
    # The same key as in training, so that the last checkpoint gets the accuracies in metrics.jsonl.
    _, _, rng_probe = jax.random.split(jax.random.key(config.seed), 3)
    if config.eval.probe_epochs:
        numbers |= monitor.linear_probe(run.dataset, run.config.eval, features, rng_probe)
    if values.semi_supervised:
        rng_few = jax.random.fold_in(jax.random.key(config.seed), 3)  # a fourth key, beside those three
        numbers |= monitor.semi_supervised(run.dataset, run.config.eval, features, rng_few)
    untrained = workdir.read_metrics(folder, 1)
    say(report.accuracies(numbers, untrained[0] if untrained else {}))
    settings = {name: getattr(config.eval, name) for name in ("knn_k", "knn_temperature", "probe_epochs")}
    workdir.write_evaluation(folder, {"step": progress.step, "epoch": epoch, **settings, **numbers})
    say(f"{folder}: evaluation.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
