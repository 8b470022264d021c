"""Train MocoSFL.

    python -m mocosfl_jax.train [--config=FILE[:PARAMETER]] [--config.FIELD=VALUE ...]
                                [--workdir=FOLDER] [--tensorboard]
                                [--coordinator=HOST:PORT --num_processes=N --process_id=I]

Without arguments: the quickstart, on a sample of images that comes with the package, in runs/quickstart.
The same command again goes on where the last one stopped. Several processes, each with devices of its own,
make one run where a cluster has started them, or by the last three arguments (docs/hosts.md).
"""

import contextlib
import importlib.util
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import jax
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import fail, say
from mocosfl_jax.config import Config, resolve
from mocosfl_jax.errors import DiskFullError, NonFiniteError, UserError
from mocosfl_jax.runtime import compiler, hosts

USAGE = (
    "--config=FILE, --config.FIELD=VALUE, --workdir=FOLDER, --tensorboard, --coordinator=HOST:PORT, "
    "--num_processes=N, --process_id=I, --help"
)


def main(argv: list[str]) -> int:
    """The command.

    Returns:
      Its exit status: 0, or 1 where the run cannot go on, 2 after a user's mistake, 128 + the number
      of the signal that stopped it.
    """
    if commandline.HELP & set(argv):
        say(commandline.help_text(__doc__))
        return 0
    try:
        config, folder, tensorboard, address = parse(argv)
        compiler.set_up()
        hosts.join(address)
    except UserError as error:
        return fail(2, error)
    agreed = True  # on a mistake of the user's, by all processes
    try:
        # Imported only here, so that a slip of the pen is answered at once.
        from mocosfl_jax.parallel import mesh as meshes
        from mocosfl_jax.runtime.environment import environment
        from mocosfl_jax.training import experiment, journal, loop, workdir

        speaks = hosts.first()
        tell = say if speaks else lambda line: None
        with hosts.together():
            if tensorboard:
                require_tensorboard()
            resolved = resolve(config)
            mesh = meshes.make_mesh(resolved.mesh, jax.devices())
            run = experiment.prepare(resolved, mesh)
        with contextlib.ExitStack() as stack:
            changed: list[str] = []
            with hosts.together():
                if speaks:
                    stack.enter_context(workdir.locked(folder))
                    changed = workdir.claim(folder, resolved, environment(meshes.first_device(mesh)))
            if changed:
                say(f"{folder}: the run began elsewhere, so its bits may differ: {'; '.join(changed)}")
            write_metrics = stack.enter_context(tensorboard_writer(folder, tensorboard and speaks))
            stop, received = stack.enter_context(stop_on_signals())
            agreed = False
            finished = loop.train(run, stop, journal.Output(folder, tell, write_metrics, speaks))
    except UserError as error:
        return fail(2, error) if agreed else fail_alone(2, error)
    except hosts.ElsewhereError:
        return 2
    except (NonFiniteError, DiskFullError) as error:
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
    again = f"python -m mocosfl_jax.train {shlex.join(argv[1:])}".strip()
    # With several processes, JAX hears SIGTERM, on whichever of them, and tells no number.
    number = received[0] if received else signal.SIGTERM
    tell(f"stopped by {number.name}; to go on: {again}")
    return 128 + number


def fail_alone(status: int, error: object) -> int:
    """As `fail`, where the other processes of the run do not fail too."""
    fail(status, error)
    hosts.leave(status)
    return status


def fail_alike(status: int, error: object) -> int:
    """As `fail`, where all processes of the run that fail do so for the same reason: process 0 tells it."""
    if hosts.first():
        fail(status, error)
    hosts.leave(status)
    return status


def parse(argv: Sequence[str]) -> tuple[Config, Path, bool, hosts.Address | None]:
    """Configuration, workdir, --tensorboard, and where the process meets others, of a command line.

    Raises:
      UserError: naming the first argument that is not understood.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard events.", flag_values=values)
        flags.DEFINE_string("coordinator", None, "Address of process 0.", flag_values=values)
        flags.DEFINE_integer("num_processes", None, "Of the run; 1: this one alone.", flag_values=values)
        flags.DEFINE_integer("process_id", None, "Of this one, from 0.", flag_values=values)

    arguments = commandline.parse(argv, USAGE, define)
    folder = Path(arguments.flags.workdir or f"runs/{arguments.name}")
    values = arguments.flags
    address = hosts.address(values.coordinator, values.num_processes, values.process_id)
    return arguments.config, folder, values.tensorboard, address


def last_checkpoint(folder: Path) -> str:
    """Where a run that failed can be picked up."""
    steps = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return (
        f"the last good checkpoint is {folder / 'checkpoints' / str(max(steps))}"
        if steps
        else "no checkpoint yet"
    )


@contextlib.contextmanager
def stop_on_signals() -> Iterator[tuple[Callable[[], bool], list[signal.Signals]]]:
    """Within, SIGINT and SIGTERM have the function return True and are listed; a second one ends the process.

    With several processes SIGTERM is left to JAX (`hosts.stop_together`), and SIGINT becomes one.
    """
    stop = threading.Event()
    received: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        stop.set()
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"\n{received[0].name}: saving after the current round\n".encode())
        for each in signals:
            signal.signal(each, before[each])
        if hosts.several():
            signal.raise_signal(signal.SIGTERM)

    signals = (signal.SIGINT,) if hosts.several() else (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, handle) for each in signals}
    try:
        yield hosts.stop_together(stop), received
    finally:
        for each in signals:
            signal.signal(each, before[each])


def require_tensorboard() -> None:
    """Raise UserError unless the extra is installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise UserError(
            "--tensorboard: tensorboardX is not installed; pip install 'mocosfl-jax[tensorboard]'"
        )


@contextlib.contextmanager
def tensorboard_writer(folder: Path, enabled: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A function that writes one line of metrics as TensorBoard scalars, or does nothing."""
    if not enabled:
        yield lambda metrics: None
        return
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard")) as writer:

        def write(metrics: Mapping[str, float]) -> None:
            for name, value in metrics.items():
                writer.add_scalar(name, value, int(metrics["step"]))
            writer.flush()

        yield write


if __name__ == "__main__":
    sys.exit(main(sys.argv))
