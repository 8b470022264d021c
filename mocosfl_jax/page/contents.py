"""What a page says about runs, read from their workdirs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mocosfl_jax.config import Own, from_dict, name_of, upgraded
from mocosfl_jax.costs.__main__ import table
from mocosfl_jax.costs.accounting import from_config
from mocosfl_jax.errors import UserError, printable
from mocosfl_jax.page.command import command, paper_defaults
from mocosfl_jax.training import comparison, report, workdir

NO_OWN = {"network": None, "algorithm": None}
# The pictures of a run, with what they show and what draws them if they are missing.
PICTURES = {
    "partition.png": ("Images of each class on each client", "training draws it at its start"),
    "neighbours.png": ("Test images and their nearest training images", ""),
    "embedding.png": ("Features of test images in two dimensions", ""),
}


class Picture(NamedTuple):
    """A picture of a run."""

    title: str
    file: bytes | None  # PNG; None: there is none
    missing: str  # why there is none, or ""


class RunOnPage(NamedTuple):
    """A run, as the page shows it."""

    name: str  # of its folder, or the whole path where two folders have the same name
    folder: str
    verdict: str  # one line
    fields: Mapping[str, Any]  # of the configuration, such as "clients.num"
    paper: Mapping[str, Any]  # what these fields are in the paper's experiments
    environment: Mapping[str, Any]  # versions, commit and devices of the start
    metrics: Sequence[workdir.Metrics]
    pictures: Sequence[Picture]
    costs: str  # a table as text, or why there is none
    command: str  # that repeats the run


class Row(NamedTuple):
    """A field of the runs, in a table."""

    name: str
    values: Sequence[str]  # one for each run
    differs: bool  # whether they are not all the same
    paper: Sequence[str]  # the paper's value where that of the run is another one, otherwise ""


def read_runs(folders: Sequence[Path]) -> list[RunOnPage]:
    """Read everything that the page says about the runs in these folders.

    Raises:
      UserError: if a folder does not hold a run, or one of its files is damaged.
    """
    names = [folder.resolve().name for folder in folders]
    return [
        read_run(folder, printable(name if names.count(name) == 1 else str(folder)))
        for folder, name in zip(folders, names, strict=True)
    ]


def read_run(folder: Path, name: str) -> RunOnPage:
    """Read a run, finished or not.

    Raises:
      UserError: if the folder does not hold a run, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"--workdir: found no folder {folder}, allowed: the folder of a run")
    record = workdir.read_record(folder)
    environment = record.pop("environment", None)
    data = record.pop(comparison.DATA, None)
    outcome = comparison.read_outcome(folder)
    record = upgraded(record)
    own = record.get("own")
    if not isinstance(own, dict) or own.keys() != NO_OWN.keys():
        raise UserError(f"{folder / 'config.json'}: config.own: found {own!r}, allowed: {', '.join(NO_OWN)}")
    try:
        # In place of its own functions, which only their file has, so that what they allow is allowed here.
        config = from_dict(
            record | {"own": {name: name_of(_unknown) if found else None for name, found in own.items()}},
            Own(**{name: _unknown if found else None for name, found in own.items()}),
        )
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    metrics = workdir.read_metrics(folder)
    real = workdir.read_clients(folder, config)
    if own != NO_OWN:
        costs = "The costs of functions of your own are not known."
    else:
        try:
            images = sum(real.values()) if real else _images(data)
            costs = table(from_config(config, images, _image_size(folder)))
        except UserError as error:
            costs = f"Not known: {error}"
    return RunOnPage(
        name,
        printable(str(folder)),
        verdict(outcome, metrics),
        comparison.flat(record),
        paper_defaults(config),
        environment if isinstance(environment, dict) else {},
        metrics,
        [_picture(folder, file) for file in PICTURES if not (real and file == "partition.png")],
        costs,
        printable(command(config, own, real=bool(real))),
    )


def _unknown(*arguments: Any) -> Any:
    """A function of a run's own."""
    raise NotImplementedError


def verdict(outcome: comparison.Outcome, metrics: Sequence[workdir.Metrics]) -> str:
    """Say in a line how far a run is, and how its accuracy compares with that of no training.

    Example:
      >>> outcome = comparison.Outcome(Path("a"), {}, (), 3, 3, True, {})
      >>> start = {"epoch": 0, "knn_backbone": 0.5, "knn_raw_pixels": 0.75}
      >>> verdict(outcome, [start, {"epoch": 3, "knn_backbone": 0.8}])
      'Finished, 3 epochs. kNN 0.800, untrained 0.500, raw pixels 0.750: 0.050 above raw pixels.'
    """
    epochs = f"{outcome.epochs:,} epoch{'' if outcome.epochs == 1 else 's'}"
    done = f"Finished, {epochs}." if outcome.finished else f"Unfinished: epoch {outcome.epoch:,} of {epochs}."
    first = metrics[0] if metrics else {}
    trained = [line for line in metrics if line["epoch"] > 0 and "knn_backbone" in line]
    if not trained:
        return f"{done} No accuracy of the trained network yet."
    accuracy, pixels = trained[-1]["knn_backbone"], first.get("knn_raw_pixels")
    parts = [f"kNN {accuracy:.3f}"]
    if not outcome.finished:
        parts[0] += f" after epoch {trained[-1]['epoch']:,}"
    start = report.before_training(outcome.fields.get("init_from"))
    parts += [f"{start} {first['knn_backbone']:.3f}"] if "knn_backbone" in first else []
    parts += [f"raw pixels {pixels:.3f}"] if pixels is not None else []
    text = f"{done} {', '.join(parts)}"
    if pixels is not None:
        text += f": {abs(accuracy - pixels):.3f} {'above' if accuracy >= pixels else 'below'} raw pixels"
    last = metrics[-1]
    if "linear_probe" in last:
        text += f". Linear probe {last['linear_probe']:.3f}"
        if "linear_probe_raw_pixels" in last:
            text += f", on raw pixels {last['linear_probe_raw_pixels']:.3f}"
    if any(line.get("collapsed") for line in metrics):
        text += ". The features have collapsed"
    return f"{text}."


def rows(
    each_run: Sequence[Mapping[str, Any]], papers: Sequence[Mapping[str, Any]] | None = None
) -> list[Row]:
    """Return the fields of all runs: first those that differ between runs, then those not as in the paper.

    Args:
      each_run: fields of each run.
      papers: what they are in the paper's experiments; None: nothing to compare with.
    """
    found = []
    for name in dict.fromkeys(name for fields in each_run for name in fields):
        values = [_shown(fields.get(name, "")) for fields in each_run]
        paper = [_shown(fields.get(name, "")) if fields else "" for fields in papers or [{}] * len(values)]
        other = [there if there and there != here else "" for here, there in zip(values, paper, strict=True)]
        found.append(Row(printable(name), values, len(set(values)) > 1, other))
    return sorted(found, key=lambda row: (not row.differs, not any(row.paper)))


def _shown(value: Any) -> str:
    return printable(str(value))


def _images(data: Any) -> int | None:
    images = data.get("training_images") if isinstance(data, dict) else None
    return images if isinstance(images, int) and images > 0 else None


def _image_size(folder: Path) -> int | None:
    return workdir.read_preprocessing(folder).image_size if workdir.has_preprocessing(folder) else None


def _picture(folder: Path, file: str) -> Picture:
    title, missing = PICTURES[file]
    try:
        content = (folder / file).read_bytes()
        if not content.startswith(b"\x89PNG"):
            return Picture(title, None, f"{file} is not a PNG file.")
        return Picture(title, content, "")
    except OSError:
        how = missing or "training draws it at its end, and python -m mocosfl_jax.evaluate from a checkpoint"
        return Picture(title, None, f"There is no {file}: {how}.")


def points(metrics: Sequence[workdir.Metrics], field: str) -> list[tuple[float, float]]:
    """Return epochs and values of a field of metrics.jsonl, where it is a number."""
    return [
        (line["epoch"], line[field])
        for line in metrics
        if isinstance(line.get(field), int | float) and math.isfinite(line[field])
    ]
