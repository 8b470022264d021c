"""The JSON files of a run: config.json, preprocessing.json, metrics.jsonl, evaluation.json, clients.json."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mocosfl_jax.config import Config, Own, Resolved, from_dict, upgraded
from mocosfl_jax.config import differences as config_differences
from mocosfl_jax.data import MAX_SIZE
from mocosfl_jax.data.fingerprint import Fingerprint, changes
from mocosfl_jax.errors import DiskFullError, UserError, is_disk_full
from mocosfl_jax.paths import replacing, why_not_writable
from mocosfl_jax.runtime.environment import Environment, differences

Metrics = Mapping[str, float]  # one line of metrics.jsonl
MOST_IMAGES = 1_000_000  # of a client over a network; their number decides how many steps an epoch has
_DATA = "data_fingerprint"  # in config.json, beside the fields of the configuration
_ENVIRONMENT = "environment"  # in config.json, next to the fields of the configuration


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Lock `workdir`, so that no other process trains there. The folder is created if it does not exist.

    The operating system releases the lock when the process ends, for any reason. On a file system without
    locks, nothing is refused.

    Raises:
      UserError: if another process trains there, or the folder cannot be written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / ".lock").open("a")
    except OSError as error:
        raise UserError(f"--workdir: {error}") from error
    with file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise UserError(
                        f"--workdir: found another process that trains in {workdir}, allowed: one run "
                        "(the processes of one run need --coordinator, --num_processes and --process_id)"
                    ) from error
        yield


class Claim(NamedTuple):
    """How a workdir was claimed."""

    environment: list[str]  # differences between the environment at the start and this one; [] for a new run
    emptied: bool  # whether another run, of which no step was trained, made way


def claim(
    workdir: Path,
    config: Resolved,
    environment: Environment,
    data: Fingerprint | None = None,
    *,
    accept_other_data: bool = False,
    real_clients: bool = False,
) -> Claim:
    """Create `workdir` and write config.json, or check an existing one.

    Fields that do not change results may differ (`config.INDIFFERENT`), and so may the environment. The
    folders of the same data may differ too. A workdir in which no step was trained is free for any run.

    Args:
      workdir: the folder of the run.
      config: the configuration of the run.
      environment: from `runtime.environment.environment`. config.json keeps that of the start of the run.
      data: fingerprint of the data set; None is not compared.
      accept_other_data: resume even if the data set has changed.
      real_clients: whether clients over a network hold the images.

    Raises:
      UserError: if the folder holds a run of another configuration, of the other kind of clients or on other
        data, or has results by other settings, or cannot be written to.
    """
    path = workdir / "config.json"
    record = config.as_dict() | {_ENVIRONMENT: environment} | ({} if data is None else {_DATA: data})
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            for other in ("metrics.jsonl", "checkpoints"):
                if (workdir / other).exists():
                    raise UserError(
                        f"--workdir: {workdir} holds {other} but no config.json; give another --workdir"
                    )
            _write_json(path, record)
            return Claim([], emptied=False)
    except OSError as error:
        raise UserError(f"--workdir: {error}") from error
    found = _read_json(path)
    there = (
        {name: value for name, value in found.items() if name not in (_ENVIRONMENT, _DATA)}
        if isinstance(found, dict)
        else {}
    )
    # Nothing is removed from a folder of another program, whose config.json is another one.
    if not all(field.name in upgraded(there) for field in dataclasses.fields(Config)):
        raise UserError(f"{path}: found no configuration of a run; give another --workdir")
    other_data = _other_data(found, data)
    changed = config_differences(upgraded(there), config.as_dict())
    if _DATA in found and not other_data:
        folders = ("config.data.dir:", "config.resist.source_dir:")
        changed = [line for line in changed if not line.startswith(folders)]
    of_real_clients = (workdir / "clients.json").exists()  # written before the first step
    relabelled = _relabelled(workdir, upgraded(there), config)
    if not _was_trained(workdir):
        if changed or other_data or relabelled or (of_real_clients and not real_clients):
            _empty(workdir)
            _write_json(path, record)
            return Claim([], emptied=True)
    elif of_real_clients != real_clients:
        kind, command = ("real", "serve") if of_real_clients else ("simulated", "train")
        raise UserError(
            f"--workdir: {workdir} holds a run of {kind} clients, of mocosfl_jax.{command}; "
            "give another --workdir"
        )
    if changed:
        raise UserError(
            f"--workdir: {workdir} holds a run of another configuration ({'; '.join(changed)}); "
            "give another --workdir"
        )
    if other_data and not accept_other_data:
        raise UserError(_refusal(workdir, other_data))
    if relabelled:
        raise UserError(
            f"{relabelled}, as the run in {workdir} has its results by it; "
            "python -m mocosfl_jax.evaluate takes other values"
        )
    # Fields that do not change results may have new values, which evaluation uses.
    _write_json(
        path, config.as_dict() | {name: found[name] for name in (_ENVIRONMENT, _DATA) if name in found}
    )
    started = found.get(_ENVIRONMENT)
    return Claim(differences(started, environment) if isinstance(started, dict) else [], emptied=False)


def _relabelled(workdir: Path, recorded: Mapping[str, Any], config: Resolved) -> str:
    """Which setting of the results that a run has so far has another value now; "" if none has.

    The results stay as they were computed, so config.json must keep saying how that was. A curve over epochs
    would have points by both settings.
    """
    lines = read_metrics(workdir)
    settings: list[str] = []
    if any("knn_backbone" in line for line in lines):
        settings += ["knn_k", "knn_temperature"]
    if any("linear_probe" in line for line in lines):
        settings += ["probe_epochs"]
    section = recorded.get("eval")
    before: Mapping[str, Any] = section if isinstance(section, dict) else {}
    for name in settings:
        now = getattr(config.eval, name)
        if before.get(name, now) != now:
            return f"config.eval.{name}: found {now}, allowed: {before[name]}"
    return ""


def require_same_data(workdir: Path, data: Fingerprint) -> None:
    """Raise UserError if the run in `workdir` started on other data. Runs of earlier versions do not say."""
    if other_data := data_changes(workdir, data):
        raise UserError(_refusal(workdir, other_data))


def data_changes(workdir: Path, data: Fingerprint) -> list[str]:
    """How data differ from those on which the run in `workdir` started, in words; [] if they are the same."""
    return _other_data(_read_json(workdir / "config.json"), data)


def _other_data(record: Any, data: Fingerprint | None) -> list[str]:
    recorded = record.get(_DATA) if isinstance(record, dict) else None
    return changes(recorded, data) if isinstance(recorded, dict) and data is not None else []


def _refusal(workdir: Path, other_data: list[str]) -> str:
    return (
        f"config.data: found other data than those of the run in {workdir} ({'; '.join(other_data)}), "
        "allowed: the same data; --accept_other_data takes them all the same"
    )


def _was_trained(workdir: Path) -> bool:
    """Whether a step was trained: a checkpoint after step 0, or anything that may be one."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return any(name != "0" for name in names) or any(line["step"] > 0 for line in read_metrics(workdir))


def _empty(workdir: Path) -> None:
    """Remove what a run has written before its first step."""
    shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    for name in ("config.json", "preprocessing.json", "metrics.jsonl", "clients.json"):
        (workdir / name).unlink(missing_ok=True)
    for name in ("partition.png", "curves.png", "neighbours.png", "embedding.png"):
        (workdir / name).unlink(missing_ok=True)


def read_config(workdir: Path, own: Own | None = None) -> Resolved:
    """Read the configuration of the run in `workdir`.

    Args:
      workdir: the folder of the run.
      own: the functions that the configuration names, from a config file that the user trusts.

    Raises:
      UserError: if there is no run, or its configuration is invalid.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir: found no folder {workdir}, allowed: the folder of a run")
    path = workdir / "config.json"
    values = _read_json(path)
    if isinstance(values, dict):
        values.pop(_ENVIRONMENT, None)
        values.pop(_DATA, None)
    try:
        return from_dict(values, own)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class Preprocessing(NamedTuple):
    """How a run prepares images for its encoder."""

    image_size: int  # in pixels
    mean: tuple[float, float, float]  # per channel, for pixels on [0, 1]
    std: tuple[float, float, float]  # per channel


def write_preprocessing(workdir: Path, preprocessing: Preprocessing) -> None:
    """Write preprocessing.json, with which images can be encoded without the data set."""
    _write_json(workdir / "preprocessing.json", preprocessing._asdict())


def has_preprocessing(workdir: Path) -> bool:
    """Whether preprocessing.json was written. A run that resumes never writes it again."""
    return (workdir / "preprocessing.json").exists()


def read_preprocessing(workdir: Path) -> Preprocessing:
    """Read preprocessing.json.

    Raises:
      UserError: if the file is missing or invalid.
    """
    path = workdir / "preprocessing.json"
    values = _read_json(path)
    if not isinstance(values, dict) or set(values) != set(Preprocessing._fields):
        raise UserError(f"{path}: found other fields, allowed: {', '.join(Preprocessing._fields)}")
    size, mean, std = (values[name] for name in Preprocessing._fields)
    if type(size) is not int or not 1 <= size <= MAX_SIZE:
        raise UserError(f"{path}: image_size: found {size!r}, allowed: 1 to {MAX_SIZE}")
    for name, three in (("mean", mean), ("std", std)):
        numbers = isinstance(three, list) and [
            x for x in three if type(x) in (int, float) and math.isfinite(x)
        ]
        if not numbers or len(numbers) != 3 or numbers != three or (name == "std" and min(numbers) <= 0):
            above = " above 0" if name == "std" else ""
            raise UserError(f"{path}: {name}: found {three!r}, allowed: three numbers{above}")
    return Preprocessing(size, tuple(mean), tuple(std))


def preprocessing_of_trained(workdir: Path) -> Preprocessing | None:
    """How the run in `workdir` prepares images; None if no step was trained there, so that any run may start.

    Raises:
      UserError: as `read_preprocessing`.
    """
    return read_preprocessing(workdir) if has_preprocessing(workdir) and _was_trained(workdir) else None


def read_record(workdir: Path) -> dict[str, Any]:
    """Read config.json as it was written: fields, environment of the start, and what identifies the data.

    Raises:
      UserError: if the file is missing or damaged.
    """
    values = _read_json(workdir / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{workdir / 'config.json'}: found no configuration of a run")
    return values


def checkpoint_steps(folder: Path) -> list[int]:
    """The training steps of the checkpoints in a folder, newest first."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)


def chosen_checkpoints(folder: Path, step: int | None) -> list[int]:
    """The training step that is asked for, or, with None, those of all checkpoints, newest first.

    Raises:
      UserError: if there is no checkpoint, or not this one.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(f"{folder}: found no checkpoint")
    if step is not None and step not in steps:
        raise UserError(f"--checkpoint: found {step}, allowed: {', '.join(map(str, steps))}")
    return steps if step is None else [step]


def require_writable(workdir: Path) -> None:
    """Raise UserError if no file can be made in `workdir`; for work whose result goes there."""
    if why := why_not_writable(workdir):
        raise UserError(f"--workdir: found {workdir}, allowed: a folder that can be written to ({why})")


def write_evaluation(workdir: Path, evaluation: Mapping[str, Any], file: str = "evaluation.json") -> None:
    """Write evaluation.json, or another file for another data set, replacing an earlier one."""
    _write_json(workdir / file, evaluation)


def append_metrics(workdir: Path, lines: Sequence[Metrics]) -> None:
    """Append lines to metrics.jsonl. They are on disk when this returns.

    Raises:
      DiskFullError: if the disk has no room for them. The file is unchanged.
    """
    path = _metrics_path(workdir)
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(metrics) + "\n" for metrics in lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if not is_disk_full(error):
            raise
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        raise DiskFullError(f"{path}: no room for {len(lines)} more lines") from error


def read_metrics(workdir: Path, lines: int | None = None) -> list[Metrics]:
    """Read the first `lines` objects of metrics.jsonl; None: all complete lines.

    Raises:
      UserError: if a line is not JSON, or no line of a run.
    """
    path = _metrics_path(workdir)
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        complete = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        found = [json.loads(line) for line in complete[:lines]]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: found a line that is not JSON ({error})") from error
    for number, line in enumerate(found, 1):
        if not isinstance(line, dict) or any(type(line.get(name)) is not int for name in ("step", "epoch")):
            raise UserError(f"{path}: found line {number} without step and epoch, allowed: those of a run")
        for name, value in line.items():
            if not isinstance(value, int | float):
                raise UserError(f"{path}: found {name} = {value!r} in line {number}, allowed: numbers")
    return found


def rewind_metrics(workdir: Path, lines: int, optional: int = 0) -> None:
    """Keep the first `lines` lines of metrics.jsonl and drop those written after the checkpoint.

    Args:
      workdir: the folder of the run.
      lines: number of lines written before the checkpoint.
      optional: number of further lines to keep if they are complete.

    Raises:
      UserError: if lines are missing, or there are lines of a run that has no checkpoint.
    """
    if not lines and (trained := sum(line["step"] > 0 for line in read_metrics(workdir))):
        raise UserError(
            f"{_metrics_path(workdir)}: found {trained} lines of a run, but {workdir / 'checkpoints'} has no "
            "checkpoint; put them back, or give another --workdir"
        )
    kept = read_metrics(workdir, lines + optional)
    if len(kept) < lines:
        raise UserError(
            f"{_metrics_path(workdir)}: found {len(kept)} lines, the checkpoint was saved after {lines}; "
            "put the file back or give another --workdir"
        )
    _write(_metrics_path(workdir), "".join(json.dumps(line) + "\n" for line in kept))


def _metrics_path(workdir: Path) -> Path:
    return workdir / "metrics.jsonl"


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"{path.parent}: holds no {path.name}, which mocosfl_jax.train writes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def read_clients(workdir: Path, config: Resolved) -> dict[int, int]:
    """Read how many images each client over a network holds; empty before they have all joined.

    Raises:
      UserError: if the file does not have a number for each client of the configuration.
    """
    path = workdir / "clients.json"
    if not path.exists():
        return {}
    record, clients = _read_json(path), [str(client) for client in range(config.clients.num)]
    if not isinstance(record, dict) or sorted(record) != sorted(clients):
        raise UserError(f"{path}: found other clients, allowed: 0 to {config.clients.num - 1}")
    fewest = config.clients.batch_size
    for client, images in record.items():
        if type(images) is not int or not fewest <= images <= MOST_IMAGES:
            raise UserError(
                f"{path}: found {str(images)[:80]} images of client {client}, "
                f"allowed: {fewest:,} to {MOST_IMAGES:,}"
            )
    return {int(client): images for client, images in record.items()}


def write_clients(workdir: Path, images: Mapping[int, int]) -> None:
    """Write how many images each client holds."""
    _write_json(workdir / "clients.json", {str(client): images[client] for client in sorted(images)})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write(path, json.dumps(values, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Replace a file atomically: after a kill, or for a reader, it is either the old or the new one."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
