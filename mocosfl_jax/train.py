"""Train MocoSFL.

    python -m mocosfl_jax.train [--config=FILE[:PARAMETER]] [--config.FIELD=VALUE ...]
                                [--workdir=FOLDER] [--tensorboard]

Without arguments: the quickstart, on a sample of images that comes with the package, in runs/quickstart.
The same command again goes on where the last one stopped.
"""

import contextlib
import importlib.util
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import jax
from absl import flags

from mocosfl_jax import commandline, compiler
from mocosfl_jax.commandline import fail, say
from mocosfl_jax.config import Config
from mocosfl_jax.errors import NonFiniteError, UserError

USAGE = "--config=FILE, --config.FIELD=VALUE, --workdir=FOLDER, --tensorboard, --help"


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
        config, folder, tensorboard = parse(argv)
    except UserError as error:
        return fail(2, error)
    try:
        compiler.set_up()
        # Imported only here, so that a slip of the pen is answered at once.
        from mocosfl_jax import experiment, loop, sharding, workdir
        from mocosfl_jax.environment import environment

        run = experiment.prepare(config, sharding.make_mesh(config.mesh))
        changed = workdir.claim(folder, run.config, environment())
        if changed:
            say(f"{folder}: the run began elsewhere, so its bits may differ: {'; '.join(changed)}")
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


def parse(argv: Sequence[str]) -> tuple[Config, Path, bool]:
    """Configuration, workdir and --tensorboard of a command line.

    Raises:
      UserError: naming the first argument that is not understood.
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_bool("tensorboard", False, "Also write TensorBoard events.", flag_values=values)

    arguments = commandline.parse(argv, USAGE, define)
    folder = Path(arguments.flags.workdir or f"runs/{arguments.name}")
    return arguments.config, folder, arguments.flags.tensorboard


def last_checkpoint(folder: Path) -> str:
    """Where a run that failed can be picked up."""
    steps = [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]
    return (
        f"the last good checkpoint is {folder / 'checkpoints' / str(max(steps))}"
        if steps
        else "no checkpoint yet"
    )


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


if __name__ == "__main__":
    sys.exit(main(sys.argv))
