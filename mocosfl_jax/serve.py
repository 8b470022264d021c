"""Train with real clients: the server's side.

    python -m mocosfl_jax.serve --config=FILE[:PARAMETER] --workdir=FOLDER --listen=HOST:PORT --tls=FOLDER
                                [--config.FIELD=VALUE ...] [--insecure]

  --listen=HOST:PORT  where clients reach the server
  --tls=FOLDER        the server's certificate, from `python -m mocosfl_jax.certificates`
  --insecure          instead of --tls: no encryption and no certificates, on this machine only

The clients hold the images that are trained on. The server's own data set serves to evaluate, and normalises
all images. Training begins when `config.clients.num` clients have joined (`python -m mocosfl_jax.join`). The
server writes what mocosfl_jax.train writes, and the same command resumes it; clients come back by themselves.
"""

import contextlib
import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from mocosfl_jax import commandline
from mocosfl_jax.commandline import fail, say
from mocosfl_jax.config import Config, resolve
from mocosfl_jax.errors import CollapsedError, DiskFullError, NonFiniteError, UserError
from mocosfl_jax.paths import utf8_path
from mocosfl_jax.runtime import compiler
from mocosfl_jax.wire.endpoint import checked_address, checked_tls, require_wire

USAGE = (
    "--config=FILE, --config.FIELD=VALUE, --workdir=FOLDER, --listen=HOST:PORT, --tls=FOLDER, "
    "--insecure, --help"
)
# Bytes of a message besides its arrays: names of fields, lengths and numbers.
_ENVELOPE = 64 * 1024
# For clients to hear that training is finished: longer than the longest pause before they try again.
_GOODBYE_SECONDS = 35.0


class Options(NamedTuple):
    """A parsed command line."""

    config: Config
    folder: Path  # the workdir
    listen: str
    tls: Path | None  # None: insecure


def main(argv: Sequence[str]) -> int:
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
        require_wire()
        compiler.set_up()
        received = serve(options)
    except UserError as error:
        return fail(2, error)
    except (CollapsedError, NonFiniteError, DiskFullError, OSError, MemoryError) as error:
        return fail(1, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        return fail(130, "interrupted")
    if not received:
        return 0
    say(f"stopped by {received[0].name}; to resume: python -m mocosfl_jax.serve {shlex.join(argv[1:])}")
    return 128 + received[0]


def parse(argv: Sequence[str]) -> Options:
    """Parse the command line.

    Raises:
      UserError: names the first invalid argument.

    Example:
      >>> parse(["serve", "--listen=127.0.0.1:8000", "--insecure"]).listen
      '127.0.0.1:8000'
    """

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
        flags.DEFINE_string("listen", None, "Address of the server.", flag_values=values)
        flags.DEFINE_string("tls", None, "Folder of the certificates.", flag_values=values)
        flags.DEFINE_bool("insecure", False, "No encryption.", flag_values=values)

    arguments = commandline.parse(argv, USAGE, define)
    values = arguments.flags
    listen = checked_address("--listen", values.listen)
    tls = checked_tls(values.tls, values.insecure, listen)
    folder = utf8_path("--workdir", f"runs/{arguments.name}" if values.workdir is None else values.workdir)
    return Options(arguments.config, folder, listen, tls)


def serve(options: Options) -> list[Any]:
    """Train with the clients that come.

    Returns:
      The signals that stopped the run; empty if it is finished.

    Raises:
      UserError: if the configuration, the data or the address cannot be used.
    """
    # Imported lazily, so that argument errors precede slow imports.
    from mocosfl_jax.parallel import mesh as meshes
    from mocosfl_jax.runtime.signals import stop_on_signals
    from mocosfl_jax.training import experiment, journal, loop, session, workdir
    from mocosfl_jax.wire import certificates, federation
    from mocosfl_jax.wire.hub import Hub, Rules, listening

    config = resolve(options.config)
    federation.check(config)
    mesh = meshes.make_mesh(config.mesh, jax.devices())
    experiment.check(config, mesh)
    credentials = None if options.tls is None else certificates.server_credentials(options.tls)
    loaded = experiment.load(config, mesh, workdir.preprocessing_of_trained(options.folder))
    clients = config.clients
    fewest = dict.fromkeys(range(clients.num), clients.batch_size)
    run = federation.plan(config, mesh, loaded, fewest)
    rules = Rules(clients.num, clients.batch_size, run.dataset.x_train.shape[1], options.tls is not None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.claimed(run, options.folder, say, accept_other_data=False))
        stop, received = stack.enter_context(stop_on_signals())
        known = workdir.read_clients(options.folder, config)
        hub = Hub(rules, say, known)
        largest = largest_message(run) + _ENVELOPE
        port = stack.enter_context(listening(hub, options.listen, credentials, largest))
        host = options.listen.rpartition(":")[0]
        say(f"listening on {host}:{port}, {'TLS' if credentials else 'without encryption'}")
        if not registered(hub, clients.num, stop):
            return received
        images = known or hub.fix()
        run = federation.plan(config, mesh, loaded, images)
        workdir.write_clients(options.folder, images)
        programs = functools.partial(federation.make_programs, hub=hub, stop=stop, say=say)
        output = journal.Output(options.folder, say, lambda metrics: None)
        try:
            finished = loop.train(run, stop, output, make_programs=programs).finished
        except federation.Abandoned as error:
            say(str(error))
            return received
        if finished:
            hub.finish("the training is finished", clients.num, _GOODBYE_SECONDS)
        say(traffic_line(hub.traffic))
    return received


def registered(hub: Any, count: int, stop: Callable[[], bool]) -> bool:
    """Wait until all clients have joined once; False if the run was stopped."""
    if len(hub.images) < count:
        say(f"waiting for {count:,} clients")
    while len(hub.images) < count and not stop():
        hub.wait(0.5)
    return not stop()


def largest_message(run: Any) -> int:
    """Bytes of the largest arrays that a client sends at once."""
    sent_as = run.smashed.dtype if run.config.wire.dtype == "exact" else run.config.wire.dtype
    smashed = 2 * run.smashed.size * jnp.dtype(sent_as).itemsize // run.cohort
    params, _ = jax.eval_shape(run.model.init, jax.random.key(0))
    return max(smashed, 3 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)))


def traffic_line(traffic: dict[str, int]) -> str:
    """Say how many bytes of messages were sent, by direction and kind."""
    kinds = ", ".join(f"{name} {traffic[name]:,}" for name in sorted(traffic))
    return f"bytes of messages: {kinds}"


if __name__ == "__main__":
    sys.exit(main(sys.argv))
