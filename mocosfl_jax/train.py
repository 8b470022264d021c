"""Train MocoSFL.

    python -m mocosfl_jax.train [--config=FILE[:PARAMETER]] [--config.FIELD=VALUE ...]
                                [--workdir=FOLDER] [--init_from=WORKDIR_OR_FILE] [--init_parts=SIDE]
                                [--tensorboard] [--accept_other_data] [-v]
                                [--coordinator=HOST:PORT --num_processes=N --process_id=I]

Without arguments, this trains the quickstart on the bundled sample of images and writes to runs/quickstart.
The same command resumes a run that was stopped. Several processes, each with its own devices, form one run
if a cluster has started them or the last three arguments are given (docs/hosts.md).

  --config=FILE        the configuration; default: the quickstart
  --config.FIELD=VALUE a field of it
  --workdir=FOLDER     for the files of the run; default: runs/ and the name of the configuration
  --init_from=...      start from the models of another run, or of an encoder file
  --init_parts=SIDE    client or server: only from those of this side of the cut
  --tensorboard        also write event files for TensorBoard
  --accept_other_data  resume although the data set has changed
  -v, --verbose        name the files of an image folder that are not used
"""

import contextlib
import importlib.util
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import fail, say
from mocosfl_jax.config import Config, resolve
from mocosfl_jax.errors import CollapsedError, DiskFullError, NonFiniteError, UserError
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.runtime import compiler, hosts
from mocosfl_jax.runtime.signals import stop_on_signals
from mocosfl_jax.training import workdir

USAGE = (
    "--config=FILE, --config.FIELD=VALUE, --workdir=FOLDER, --init_from=WORKDIR_OR_FILE, "
    "--init_parts=client|server|both, --tensorboard, --accept_other_data, -v, "
    "--coordinator=HOST:PORT, --num_processes=N, --process_id=I, --help"
)


def main(argv: list[str]) -> int:
    """Run the command.

    Returns:
      The exit status: 0, 1 if the run cannot continue, 2 for a user error, or 128 + the number of
      the signal that stopped the run.
    """
    if commandline.HELP & set(argv):
        say(commandline.help_text(__doc__))
        return 0
    try:
        options = parse(argv)
        compiler.set_up()
        hosts.join(options.address)
    except UserError as error:
        return fail(2, error)
    folder = options.folder
    on_all = True  # until training starts, a UserError is raised on all processes
    try:
        # Imported lazily, so that argument errors precede slow imports.
        from mocosfl_jax.parallel import mesh as meshes
        from mocosfl_jax.training import experiment, journal, loop, session

        first = hosts.first()
        report = say if first else lambda line: None
        with hosts.together():
            if options.tensorboard:
                require_tensorboard()
            resolved = resolve(options.config)
            mesh = meshes.make_mesh(resolved.mesh, jax.devices())
            run = experiment.prepare(resolved, mesh, preprocessing=workdir.preprocessing_of_trained(folder))
            for path, reason in run.dataset.unused if options.verbose else ():
                report(f"not used: {path} ({reason})")
        with contextlib.ExitStack() as stack:
            with hosts.together():
                if first:
                    stack.enter_context(
                        session.claimed(run, folder, say, accept_other_data=options.accept_other_data)
                    )
            write_metrics = stack.enter_context(tensorboard_writer(folder, options.tensorboard and first))
            stop, received = stack.enter_context(stop_on_signals())
            on_all = False
            finished = loop.train(run, stop, journal.Output(folder, report, write_metrics, first)).finished
    except UserError as error:
        return fail(2, error) if on_all else fail_alone(2, error)
    except hosts.ElsewhereError:
        return 2
    except (CollapsedError, NonFiniteError, DiskFullError) as error:
        return fail_alike(1, f"{error}; {last_checkpoint(folder)}")
    except KeyboardInterrupt:
        return fail_alone(130, "interrupted")
    except Exception as error:
        if hosts.is_lost(error):
            hosts.leave(1, hosts.lost(error))
        if isinstance(error, OSError | MemoryError):
            return fail_alone(1, f"{str(error) or type(error).__name__}; {last_checkpoint(folder)}")
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            return fail_alone(1, f"out of memory: {error}; {last_checkpoint(folder)}")
        if hosts.several():
            traceback.print_exc()
            hosts.leave(1)
        raise
    if finished:
        return 0
    command = f"python -m mocosfl_jax.train {shlex.join(argv[1:])}".strip()
    # With several processes, JAX receives SIGTERM on one of them and does not report the signal.
    number = received[0] if received else signal.SIGTERM
    report(f"stopped by {number.name}; to resume: {command}")
    return 128 + number


def fail_alone(status: int, error: object) -> int:
    """Like `fail`, for an error that the other processes of the run do not have."""
    fail(status, error)
    hosts.leave(status)
    return status


def fail_alike(status: int, error: object) -> int:
    """Like `fail`, for an error that all processes of the run have; process 0 reports it."""
    if hosts.first():
        fail(status, error)
    hosts.leave(status)
    return status


class Options(NamedTuple):
    """A parsed command line."""

    config: Config
    folder: Path  # the workdir
    tensorboard: bool = False
    accept_other_data: bool = False
    verbose: bool = False
    address: hosts.Address | None = None  # at which the processes of the run connect


def parse(argv: Sequence[str]) -> Options:
    """Parse the command line.

    Raises:
      UserError: names the first invalid argument.

    Example:
      >>> options = parse(["train", "--config.epochs=2"])
      >>> options.config.epochs, str(options.folder), options.tensorboard
      (2, 'runs/quickstart', False)
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_string("init_from", None, "Workdir or encoder file.", flag_values=values)
        flags.DEFINE_string("init_parts", None, "client, server or both.", flag_values=values)
        flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard events.", flag_values=values)
        flags.DEFINE_bool("accept_other_data", False, "Resume on other data.", flag_values=values)
        flags.DEFINE_bool("verbose", False, "Name unused files.", short_name="v", flag_values=values)
        flags.DEFINE_string("coordinator", None, "Address of process 0.", flag_values=values)
        flags.DEFINE_integer("num_processes", None, "Number of processes in the run.", flag_values=values)
        flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", flag_values=values)

    arguments = commandline.parse(argv, USAGE, define)
    values = arguments.flags
    folder = utf8_path("--workdir", f"runs/{arguments.name}" if values.workdir is None else values.workdir)
    if values.init_from is not None:
        arguments.config.init_from = str(utf8_path("--init_from", values.init_from))
    if values.init_parts is not None:
        arguments.config.init_parts = values.init_parts
    address = hosts.address(values.coordinator, values.num_processes, values.process_id)
    return Options(
        arguments.config, folder, values.tensorboard, values.accept_other_data, values.verbose, address
    )


def last_checkpoint(folder: Path) -> str:
    """Describe the checkpoint from which a failed run can resume."""
    steps = workdir.checkpoint_steps(folder / "checkpoints")
    return (
        f"the last good checkpoint is {folder / 'checkpoints' / str(steps[0])}"
        if steps
        else "no checkpoint yet"
    )


def require_tensorboard() -> None:
    """Raise UserError unless tensorboardX is installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "--tensorboard: tensorboardX is not installed; pip install 'mocosfl-jax[tensorboard]'"
        )


@contextlib.contextmanager
def tensorboard_writer(folder: Path, enabled: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that writes a line of metrics as TensorBoard scalars, or does nothing.

    A run that resumes repeats the steps after its checkpoint. So with the first line, when metrics.jsonl was
    taken back to the checkpoint, the events are written anew from it. So are those of a finished run, which
    has no further line.
    """
    if not enabled:
        yield lambda metrics: None
        return
    from tensorboardX import SummaryWriter

    writers: list[SummaryWriter] = []

    def write(*metrics: Mapping[str, float]) -> None:
        lines = metrics
        if not writers:
            for events in (folder / "tensorboard").glob("events.out.tfevents.*"):
                events.unlink()
            lines = (*workdir.read_metrics(folder), *metrics)
            writers.append(SummaryWriter(str(folder / "tensorboard")))
        for line in lines:
            for name, value in line.items():
                writers[0].add_scalar(name, value, int(line["step"]))
        writers[0].flush()

    try:
        yield write
        if not writers:
            write()
    finally:
        for writer in writers:
            writer.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
