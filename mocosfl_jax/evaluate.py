"""Evaluate a checkpoint of a run: kNN, a linear probe and, on request, classifiers trained on few labels.

    python -m mocosfl_jax.evaluate --workdir=FOLDER [--checkpoint=STEP] [--probe_epochs=N] [--semi_supervised]
                                   [--knn_k=K] [--knn_temperature=T]
                                   [--data.name=NAME] [--data.dir=FOLDER] [--data.max_broken=SHARE]
                                   [--resist.source_dir=FOLDER] [--accept_other_data] [--config=FILE]

  --workdir=FOLDER     the folder of a run of mocosfl_jax.train, finished or not
  --checkpoint=STEP    a number in FOLDER/checkpoints; default: the newest
  --probe_epochs=N     epochs of the linear probe and the semi-supervised classifiers, 0 to skip them;
                       default: config.eval.probe_epochs of the run
  --knn_k=K            neighbours that vote; default: config.eval.knn_k of the run
  --knn_temperature=T  of the votes' weights; default: config.eval.knn_temperature of the run
  --semi_supervised    also train a small network on the features with 10 % and with 1 % of the labels
  --data.dir=FOLDER    where the run's data set is now; default: config.data.dir of the run
  --resist.source_dir=FOLDER  the same for the second data set of a run with config.resist.source
  --accept_other_data  evaluate on the data set even if it has changed since the training; evaluation.json
                       then says what differs
  --data.name=NAME     evaluate on this data set instead, with its classes: transfer. It is in --data.dir, by
                       default `data`. Its images are prepared as the run's: size, mean and standard deviation
  --config=FILE        the config file of a run with functions of its own, which no workdir holds
  --data.max_broken=SHARE  how large a share of a split's images may fail to decode; such images are black

Prints the accuracies and writes them to FOLDER/evaluation.json, and draws neighbours.png and embedding.png
there; those on another data set are evaluation_NAME.json, neighbours_NAME.png and embedding_NAME.png. Nothing
else in the folder changes. The run's own data set is not downloaded: if
it is missing, that is reported. A data set that --data.name names is downloaded as in training.
"""

import dataclasses
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import say
from mocosfl_jax.config import Data, Own, Resolved
from mocosfl_jax.data import Dataset, download
from mocosfl_jax.data.fingerprint import fingerprint
from mocosfl_jax.errors import UserError
from mocosfl_jax.evaluation.examples import more_than_zero
from mocosfl_jax.paths import user_path, utf8_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.training import workdir

if TYPE_CHECKING:
    from mocosfl_jax.training.experiment import Loaded

USAGE = (
    "--workdir=FOLDER, --config=FILE, --checkpoint=STEP, --probe_epochs=N, --semi_supervised, --knn_k=K, "
    "--knn_temperature=T, --data.name=NAME, --data.dir=FOLDER, --data.max_broken=SHARE, "
    "--resist.source_dir=FOLDER, --accept_other_data, --help"
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
        flags.DEFINE_integer("knn_k", None, "Neighbours that vote.", lower_bound=1, flag_values=values)
        flags.DEFINE_float("knn_temperature", None, "Of the votes' weights.", flag_values=values)
        flags.DEFINE_bool("semi_supervised", False, "Also with few labels.", flag_values=values)
        flags.DEFINE_bool("accept_other_data", False, "Evaluate on other data.", flag_values=values)
        flags.DEFINE_string("resist.source_dir", None, "Where the run's source is.", flag_values=values)
        commandline.define_data(values)

    values = commandline.parse_flags(argv, USAGE, define, required=["workdir"])
    folder = utf8_path("--workdir", values.workdir)
    config = workdir.read_config(folder, commandline.own_functions(values.config))
    recorded = dataclasses.replace(config.eval)
    for name in ("probe_epochs", "knn_k", "knn_temperature"):
        if values[name].value is not None:
            setattr(config.eval, name, values[name].value)
    more_than_zero("--knn_temperature", config.eval.knn_temperature)
    if values.semi_supervised and not config.eval.probe_epochs:
        raise UserError("--probe_epochs: found 0, allowed: 1 or more with --semi_supervised")
    given = commandline.given_data(values)
    workdir.chosen_checkpoints(folder / "checkpoints", values.checkpoint)
    workdir.require_writable(folder)

    compiler.set_up()
    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.evaluation import monitor
    from mocosfl_jax.pictures.features import plot_features
    from mocosfl_jax.training import report

    if "name" in given:
        subject = other_data(folder, given, values.checkpoint, config.own)
    else:
        for name, value in given.items():
            setattr(config.data, name, value)
        config.resist.source_dir = values["resist.source_dir"].value or config.resist.source_dir
        subject = own_data(folder, config, values.checkpoint, accept_changed=values.accept_other_data)
    dataset, features = subject.dataset, subject.features
    numbers = monitor.knn(dataset, config.eval, features) | monitor.knn_raw_pixels(dataset, config.eval)
    # The same key as in training, so that the last checkpoint gets the accuracies in metrics.jsonl.
    _, _, rng_probe = jax.random.split(jax.random.key(config.seed), 3)
    if config.eval.probe_epochs:
        numbers |= monitor.linear_probe(dataset, config.eval, features, rng_probe)
    if values.semi_supervised:
        rng_few = jax.random.fold_in(jax.random.key(config.seed), 3)  # a fourth key, beside those three
        numbers |= monitor.semi_supervised(dataset, config.eval, features, rng_few)
    voted = [(each.knn_k, each.knn_temperature) for each in (recorded, config.eval)]
    untrained = subject.untrained if voted[0] == voted[1] else {}
    say(report.accuracies(numbers, untrained, report.before_training(config.init_from)))
    settings = {name: getattr(config.eval, name) for name in ("knn_k", "knn_temperature", "probe_epochs")}
    workdir.write_evaluation(folder, {**subject.record, **settings, **numbers}, subject.file)
    ending = subject.file.removeprefix("evaluation").removesuffix(".json")
    drawn = plot_features(folder, dataset, features, ending)
    say(f"{folder}: {', '.join([subject.file, *drawn])}")


class Subject(NamedTuple):
    """What is evaluated."""

    file: str  # name of the file in the workdir
    dataset: Dataset  # with the mean and the standard deviation of the run
    features: Any  # `evaluation.monitor.Evaluated`
    record: dict[str, Any]  # the first fields of the file
    untrained: Mapping[str, float]  # accuracies of the untrained network, as far as they are known


def own_data(folder: Path, config: Resolved, checkpoint: int | None, *, accept_changed: bool) -> Subject:
    """Encode the data set on which a run was trained.

    Args:
      folder: the workdir.
      config: of the run.
      checkpoint: its training step; None: the newest.
      accept_changed: whether the data set may have changed since the training.
    """
    from mocosfl_jax.evaluation import monitor
    from mocosfl_jax.evaluation.features import make_encode
    from mocosfl_jax.parallel.mesh import one_device
    from mocosfl_jax.training import checkpoint as checkpoints
    from mocosfl_jax.training import experiment
    from mocosfl_jax.training.build import whole_head

    device = jax.devices()[0]
    with download.forbidden():
        if accept_changed:
            config.data.image_size = workdir.read_preprocessing(folder).image_size
            loaded = experiment.load(config, one_device(device))
            if changes := workdir.data_changes(folder, loaded.fingerprint):
                return changed_data(folder, loaded, checkpoint, config.own, changes)
        run = experiment.of_workdir(config, one_device(device), folder, accept_other_data=accept_changed)
    state, progress = checkpoints.restore(folder / "checkpoints", checkpoint, run.algorithm, device)
    epoch = progress.step / run.steps_per_epoch
    say(f"{folder}: checkpoint {progress.step:,}, epoch {epoch:g} of {run.config.total_epochs:,}")
    head = whole_head(config, run.model, run.algorithm, run.mesh)
    encode = make_encode(run.algorithm, run.dataset.mean, run.dataset.std, head)
    return Subject(
        "evaluation.json",
        run.dataset,
        monitor.features(run.dataset, state, encode),
        {"step": progress.step, "epoch": epoch, "data_fingerprint": run.fingerprint},
        next(iter(workdir.read_metrics(folder, 1)), {}),
    )


def changed_data(
    folder: Path, loaded: "Loaded", checkpoint: int | None, own: Own, changes: Sequence[str]
) -> Subject:
    """Encode the data set of a run that has changed since the training, prepared as the images of the run.

    Args:
      folder: the workdir.
      loaded: the data set as it is now, with images of the run's size.
      checkpoint: its training step; None: the newest.
      own: the functions that the run's configuration names.
      changes: how it differs from the run's, in words.
    """
    dataset, features, step = encode_as_run(folder, loaded.dataset, checkpoint, own)
    # How many steps an epoch had depends on the data, so only the run itself can say which one this was.
    epochs = [line["epoch"] for line in workdir.read_metrics(folder) if line.get("step") == step]
    at = f", epoch {epochs[-1]:,}" if epochs else ""
    say(f"{folder}: checkpoint {step:,}{at}, on other data than the run's ({'; '.join(changes)})")
    record = {
        "step": step,
        **({"epoch": epochs[-1]} if epochs else {}),
        "data_fingerprint": loaded.fingerprint,
        "other_data": list(changes),
    }
    return Subject("evaluation.json", dataset, features, record, {})


def other_data(folder: Path, given: dict[str, Any], checkpoint: int | None, own: Own) -> Subject:
    """Encode a data set that the user has named, prepared as the images of the run.

    Args:
      folder: the workdir.
      given: fields of the data set, among them its name.
      checkpoint: its training step; None: the newest.
      own: the functions that the run's configuration names.
    """
    data = Data(**given)
    image_size = workdir.read_preprocessing(folder).image_size
    dataset = commandline.load_data(given, image_size)
    dataset, features, step = encode_as_run(folder, dataset, checkpoint, own)
    say(f"{folder}: checkpoint {step:,} on {dataset.source}, {len(dataset.class_names)} classes")
    record = {
        "step": step,
        "data": {"name": data.name, "dir": data.dir, "image_size": image_size},
        "data_fingerprint": fingerprint(dataset),
    }
    return Subject(file_name(data), dataset, features, record, {})


def encode_as_run(
    folder: Path, dataset: Dataset, checkpoint: int | None, own: Own
) -> tuple[Dataset, Any, int]:
    """Encode any data set whose images have the run's size.

    Returns:
      The data set with the run's mean and standard deviation, its features, and the checkpoint's step.
    """
    from mocosfl_jax.evaluation import monitor
    from mocosfl_jax.evaluation.features import encode_of
    from mocosfl_jax.training.encoder import read_encoder

    encoder, step = read_encoder(folder, checkpoint, own=own)
    _, mean, std = workdir.read_preprocessing(folder)
    dataset = dataset._replace(mean=mean, std=std)
    return dataset, monitor.features(dataset, encoder.params, encode_of(encoder)), step


def file_name(about: Data) -> str:
    """Return the name of the file for the accuracies on another data set.

    It ends with the name of the data set. Data sets of one's own have the name of their file or folder too.

    Example:
      >>> file_name(Data(name="cifar10")), file_name(Data(name="image_folder", dir="/data/my pets"))
      ('evaluation_cifar10.json', 'evaluation_image_folder_my_pets.json')
    """
    words = about.name
    if about.name in ("npz", "npy", "image_folder", "imagenet12"):
        words += f"_{user_path('--data.dir', about.dir).resolve().name.removesuffix('.npz')}"
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", words)
    if not words.isascii():  # names in other letters would all be the same
        plain += f"_{hashlib.sha256(words.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return f"evaluation_{plain}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
