"""The files of a run: config.json and metrics.jsonl."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mocosfl_jax.config import Config, differences
from mocosfl_jax.errors import UserError

Metrics = Mapping[str, float]  # one line of metrics.jsonl


def claim(workdir: Path, config: Config) -> None:
    """Make `workdir` and write config.json, or see that the one that is there says the same.

    Raises:
      UserError: if the folder holds a run of another configuration, or cannot be written to.
    """
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            for other in ("metrics.jsonl", "checkpoints"):
                if (workdir / other).exists():
                    raise UserError(f"--workdir: {workdir} holds {other} but no config.json; give another")
            _write(path, json.dumps(config.as_dict(), indent=2) + "\n")
            return
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"--workdir: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); give another --workdir") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: found no configuration; give another --workdir")
    changed = differences(found, config.as_dict())
    if changed:
        raise UserError(
            f"--workdir: {workdir} holds a run of another configuration ({'; '.join(changed)}); "
            "give another --workdir"
        )


def append_metrics(workdir: Path, metrics: Metrics) -> None:
    """One more line of metrics.jsonl, on disk when this returns."""
    with _metrics_path(workdir).open("a") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(workdir: Path, lines: int | None = None) -> list[Metrics]:
    """The first `lines` objects of metrics.jsonl; None: all complete lines.

    Raises:
      UserError: if a line is not JSON.
    """
    path = _metrics_path(workdir)
    if not path.exists():
        return []
    complete = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    try:
        return [json.loads(line) for line in complete[:lines]]
    except ValueError as error:
        raise UserError(f"{path}: found a line that is not JSON ({error})") from error


def rewind_metrics(workdir: Path, lines: int, optional: int = 0) -> None:
    """Keep the first `lines` lines of metrics.jsonl: the others were written after the checkpoint.

    Args:
      workdir: of the run.
      lines: written before the checkpoint.
      optional: how many of the lines after it are kept too, if they are there and complete.

    Raises:
      UserError: if lines are missing.
    """
    kept = read_metrics(workdir, lines + optional)
    if len(kept) < lines:
        raise UserError(
            f"{_metrics_path(workdir)}: found {len(kept)} lines, the checkpoint was saved after {lines}; "
            "put the file back or give another --workdir"
        )
    _write(_metrics_path(workdir), "".join(json.dumps(line) + "\n" for line in kept))


def _metrics_path(workdir: Path) -> Path:
    return workdir / "metrics.jsonl"


def _write(path: Path, text: str) -> None:
    """Replace the file in one go: a reader, or a kill, sees the old or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
