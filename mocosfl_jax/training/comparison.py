"""Compares runs: one row for each experiment, with means over its seeds."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mocosfl_jax.config import upgraded
from mocosfl_jax.data.fingerprint import SAMPLED
from mocosfl_jax.errors import UserError, printable
from mocosfl_jax.training import workdir

# The numbers that are compared, as metrics.jsonl names them: those of the end of a run.
MEASURES = ("knn_backbone", "knn_projection", "linear_probe", "loss")

# Fields and sections in which the runs of one row may differ: seeds, and what does not change MEASURES. The
# folder of the data may differ too, since their fingerprint says whether they are the same.
SEEDS = ("seed", "clients.seed")
INDIFFERENT = (
    *("data.resident", "data.max_broken", "saving.replay_gib"),
    *("eval.every", "checkpoint", "mesh"),
)
DATA = "data_fingerprint"


class Outcome(NamedTuple):
    """What a run has reached."""

    folder: Path  # the workdir
    fields: Mapping[str, Any]  # the fields that make it another experiment, such as "clients.num"
    seeds: tuple[Any, ...]  # the values of `SEEDS`
    epoch: int  # epochs done
    epochs: int  # epochs of the whole run
    finished: bool  # whether all epochs are done, and the linear probe if there is one
    numbers: Mapping[str, float]  # the newest values of `MEASURES`


class Mean(NamedTuple):
    """The mean of a measure over seeds."""

    mean: float
    error: float | None  # standard error; None for a single seed


class Row(NamedTuple):
    """An experiment: runs that differ in nothing but seeds."""

    fields: Mapping[str, Any]
    seeds: int  # number of runs
    means: Mapping[str, Mean]


class Table(NamedTuple):
    """Experiments, in the order of their first runs."""

    columns: tuple[str, ...]  # the fields in which the rows differ
    rows: tuple[Row, ...]


def workdirs(path: Path) -> list[Path]:
    """Return the workdir `path`, or the workdirs in that folder, sorted by name.

    Raises:
      UserError: if there are none.
    """
    if (path / "config.json").is_file():
        return [path]
    found = sorted(file.parent for file in path.glob("*/config.json")) if path.is_dir() else []
    if not found:
        raise UserError(f"found no run in {path}, allowed: the folder of a run, or of several")
    return found


def read_outcome(folder: Path) -> Outcome:
    """Read what the run in `folder` has reached, from config.json and metrics.jsonl.

    Raises:
      UserError: if one of these files is damaged.
    """
    record = workdir.read_record(folder)
    data = record.pop(DATA, None)
    if isinstance(data, dict):  # earlier versions did not record the sample
        data = {name: value for name, value in data.items() if not name.endswith(SAMPLED)}
    record.pop("environment", None)
    every = flat(upgraded(record))
    try:
        epochs = every["epochs"] * (every["clients.num"] // every["clients.cohort"])
        probed = every["eval.probe_epochs"] > 0
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{folder / 'config.json'}: found no configuration of a run") from error
    dropped = (*SEEDS, *INDIFFERENT, "data.dir", "resist.source_dir")
    fields = {
        name: value
        for name, value in every.items()
        if not any(name == each or name.startswith(f"{each}.") for each in dropped)
    }
    # Runs of earlier versions have no fingerprint.
    fields[DATA] = hashlib.sha256(_key(data).encode()).hexdigest()[:8] if data else every.get("data.dir")
    if (holdings := folder / "clients.json").exists():  # of clients over a network, with images of their own
        fields["real clients"] = hashlib.sha256(holdings.read_bytes()).hexdigest()[:8]
    epoch = 0
    numbers: dict[str, float] = {}
    for line in workdir.read_metrics(folder):
        epoch = max(epoch, int(line["epoch"]))
        if line["epoch"] > 0:  # before that, nothing was trained
            numbers |= {name: line[name] for name in MEASURES if name in line}
    finished = epoch >= epochs and ("linear_probe" in numbers or not probed)
    seeds = tuple(every.get(name) for name in SEEDS)
    return Outcome(folder, fields, seeds, epoch, epochs, finished, numbers)


def twins(outcomes: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """Return the runs that repeat another one, with the same seeds, each behind the one that got furthest."""
    firsts: dict[str, Outcome] = {}
    found = []
    for outcome in sorted(outcomes, key=lambda each: (not each.finished, -each.epoch)):
        first = firsts.setdefault(_key(outcome.fields, outcome.seeds), outcome)
        if first is not outcome:
            found.append((first, outcome))
    return found


def compare(outcomes: Sequence[Outcome]) -> Table:
    """Return a row for each experiment, with means over its runs.

    Example:
      >>> run = Outcome(Path("a"), {"epochs": 3}, (1, 1), 3, 3, True, {"loss": 2.0})
      >>> table = compare([run, run._replace(seeds=(2, 2), numbers={"loss": 4.0})])
      >>> table.rows[0].seeds, table.rows[0].means["loss"]
      (2, Mean(mean=3.0, error=1.0))

    Args:
      outcomes: of runs, no two of which have the same fields and seeds.
    """
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(_key(outcome.fields), []).append(outcome)
    rows = tuple(_row(runs) for runs in groups.values())
    names = list(dict.fromkeys(name for row in rows for name in row.fields))
    columns = [name for name in names if len({_key(row.fields.get(name)) for row in rows}) > 1]
    # Other data under another name need no second column.
    named = [name for name in columns if name != DATA]
    if len({_key([row.fields.get(name) for name in named]) for row in rows}) == len(rows):
        columns = named
    return Table(tuple(columns), rows)


def _row(runs: Sequence[Outcome]) -> Row:
    means = {}
    for name in MEASURES:
        values = [run.numbers[name] for run in runs if name in run.numbers]
        if values:
            with np.errstate(invalid="ignore"):  # NaN and infinity are numbers that a run may have recorded
                error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
                means[name] = Mean(float(np.mean(values)), error)
    return Row(runs[0].fields, len(runs), means)


def markdown(table: Table) -> str:
    """Format a table in Markdown: `mean ± standard error`, with three decimals."""

    def number(mean: Mean | None) -> str:
        if mean is None:
            return ""
        return f"{mean.mean:.3f}" + ("" if mean.error is None else f" ± {mean.error:.3f}")

    lines = [[*table.columns, "seeds", *(name.replace("_", " ").replace("knn", "kNN") for name in MEASURES)]]
    for row in table.rows:
        fields = [printable(str(row.fields.get(name))).replace("|", r"\|") for name in table.columns]
        lines.append([*fields, str(row.seeds), *(number(row.means.get(name)) for name in MEASURES)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))} |"
        for line in lines
    )


def comma_separated(table: Table) -> str:
    """Format a table as CSV, with all digits, and each standard error in a column of its own."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    numbers = [each for name in MEASURES for each in (name, f"{name}_standard_error")]
    writer.writerow([*table.columns, "seeds", *numbers])
    for row in table.rows:
        means = [number for name in MEASURES for number in row.means.get(name, ("", ""))]
        values = [row.fields.get(name) for name in table.columns]
        fields = ["" if value is None else printable(str(value)) for value in values]
        writer.writerow([*fields, row.seeds, *means])
    return file.getvalue()


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with names such as "clients.num"."""
    found: dict[str, Any] = {}
    for name, value in values.items() if isinstance(values, dict) else ():
        found |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found


def _key(*values: Any) -> str:
    """Return a text that is the same for the same values."""
    return json.dumps(values, sort_keys=True, default=dict)
