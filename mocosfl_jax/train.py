"""Train MocoSFL.

    python -m mocosfl_jax.train [--config=FILE] [--config.FIELD=VALUE ...] [--workdir=FOLDER] [--tensorboard]

Without arguments: the quickstart, on a sample of images that comes with the package, in runs/quickstart.
The same command again goes on where the last one stopped.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import os
import re
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from mocosfl_jax import compiler
from mocosfl_jax.config import Config, quickstart
from mocosfl_jax.errors import NonFiniteError, UserError

USAGE = "--config=FILE, --config.FIELD=VALUE, --workdir=FOLDER, --tensorboard, --help"


def main(argv: list[str]) -> int:
    """The command.

    Returns:
      Its exit status: 0, or 1 where the run cannot go on, 2 after a user's mistake, 128 + the number
      of the signal that stopped it.
    """
    if {"--help", "-h", "-help", "--helpfull"} & set(argv):
        say(help_text())
        return 0
    try:
        config, folder, tensorboard = parse(argv)
    except UserError as error:
        return fail(2, error)
    try:
        compiler.set_flags()
        # Imported only here, so that a slip of the pen is answered at once.
        from mocosfl_jax import experiment, loop, workdir

        run = experiment.prepare(config)
        workdir.claim(folder, run.config)
        with tensorboard_writer(folder, tensorboard) as write_metrics, stop_on_signals() as (stop, received):
            finished = loop.train(run, stop, loop.Output(folder, say, write_metrics))
    except UserError as error:
        return fail(2, error)
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    except (NonFiniteError, OSError, MemoryError) as error:
        return fail(1, f"{str(error) or type(error).__name__}; {last_checkpoint(folder)}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fail(1, f"out of memory: {error}; {last_checkpoint(folder)}")
    if finished:
        return 0
    again = f"python -m mocosfl_jax.train {shlex.join(argv[1:])}".strip()
    say(f"stopped by {received[0].name}; to go on: {again}")
    return 128 + received[0]


def fail(status: int, error: object) -> int:
    """Say in one line what went wrong."""
    print("error:", " ".join(str(error).split())[:2000], file=sys.stderr)
    return status


def last_checkpoint(folder: Path) -> str:
    """Where a run that failed can be picked up."""
    steps = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return (
        f"the last good checkpoint is {folder / 'checkpoints' / str(max(steps))}"
        if steps
        else "no checkpoint yet"
    )


def parse(argv: Sequence[str]) -> tuple[Config, Path, bool]:
    """Configuration, workdir and --tensorboard of a command line.

    Raises:
      UserError: naming the first argument that is not understood.
    """
    unset, argv = split_unset(argv)
    for argument in argv[1:]:
        check_field(argument)
    values = flags.FlagValues()
    files: list[str] = []

    def load(path: str) -> Config:
        files.append(path)
        return load_config(path)

    try:
        config_flags.DEFINE_config_dataclass(
            "config", quickstart(), "A file with get_config().", values, sys_argv=list(argv), parse_fn=load
        )
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard events.", flag_values=values)
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(explain(error)) from error
    if rest:
        raise UserError(f"found {rest[0]!r}, allowed: {USAGE}")
    for path in unset:
        *parents, name = path.split(".")
        setattr(functools.reduce(getattr, parents, values.config), name, None)
    name = Path(files[-1]).stem if files else "quickstart"
    return values.config, Path(values.workdir or f"runs/{name}"), values.tensorboard


def split_unset(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--config.FIELD=None` out of a command line, since absl cannot parse it for a number.

    Returns:
      The fields, below `config`, and the other arguments. Whether a field may be None shows when the
      configuration is checked.
    """
    unset, others = [], []
    for argument in argv:
        match = re.fullmatch(r"--?config\.(.+)=(?i:none)", argument)
        if match:
            check_field(argument)
            unset.append(match[1])
        else:
            others.append(argument)
    return unset, others


def check_field(argument: str) -> None:
    """Raise UserError if `argument` sets a field that no configuration has."""
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    node: Any = quickstart()
    path = "config"
    for part in match[1].split(".") if match else []:
        names = [field.name for field in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if part not in names:
            close = difflib.get_close_matches(part, names, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            allowed = ", ".join(names) if names else "no field below it"
            raise UserError(f"{path}: found field {part!r}{hint}, allowed: {allowed}")
        node, path = getattr(node, part), f"{path}.{part}"


def load_config(path: str) -> Config:
    """What get_config() of the Python file at `path` returns.

    Raises:
      UserError: if there is no such file, or it does not work.
    """
    if not Path(path).is_file():
        raise UserError(f"--config: found no file {path}, allowed: a Python file with get_config()")
    try:
        config = runpy.run_path(path)["get_config"]()
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, allowed: a Config")
    return config


def explain(error: BaseException) -> str:
    """One line for a mistake that absl has found."""
    cause = error.__context__
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__context__
    if cause is not None:
        return str(cause)
    wrong_type = re.match(r"flag --(config\.[\w.]+)=(.*?): ", str(error), re.DOTALL)
    if wrong_type is None:
        return str(error).replace("\n", " ")
    *parents, name = wrong_type[1].split(".")[1:]
    node: Any = quickstart()
    for part in parents:
        node = getattr(node, part)
    (allowed,) = (field.type for field in dataclasses.fields(node) if field.name == name)
    return f"{wrong_type[1]}: found {wrong_type[2]!r}, allowed: {type_name(allowed)}"


def type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def help_text() -> str:
    """The module's words, and every field with its default."""

    def lines(node: Any, path: str) -> Iterator[str]:
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if dataclasses.is_dataclass(value):
                yield from lines(value, f"{path}.{field.name}")
            else:
                yield f"  --{path}.{field.name}={value}  ({type_name(field.type)})"

    fields = "\n".join(lines(quickstart(), "config"))
    return f"{__doc__}\nFields and their values in the quickstart (see mocosfl_jax/config.py):\n{fields}"


@contextlib.contextmanager
def stop_on_signals() -> Iterator[tuple[threading.Event, list[signal.Signals]]]:
    """Within, SIGINT and SIGTERM set the event and are listed; a second one ends the process at once."""
    stop = threading.Event()
    received: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        stop.set()
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"\n{received[0].name}: saving after the current round\n".encode())
        for each in signals:
            signal.signal(each, before[each])

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, handle) for each in signals}
    try:
        yield stop, received
    finally:
        for each in signals:
            signal.signal(each, before[each])


@contextlib.contextmanager
def tensorboard_writer(folder: Path, enabled: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A function that writes one line of metrics as TensorBoard scalars, or does nothing."""
    if not enabled:
        yield lambda metrics: None
        return
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "--tensorboard: tensorboardX is not installed; pip install 'mocosfl-jax[tensorboard]'"
        )
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def write(metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, int(metrics["step"]))
            writer.flush()

        yield write


def say(line: str) -> None:
    """Print above the progress bar."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
