"""The processes of one run, one per host or device: how they connect, agree, stop and end.

JAX's distributed runtime does the work. A run of a single process does not start it.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mocosfl_jax.errors import UserError
from mocosfl_jax.runtime.stderr_filter import filter_stderr

# Seconds without a heartbeat after which a process counts as dead and the others end.
HEARTBEAT = 60
# Seconds that all processes have to connect to the coordinator at the start.
MEETING = 300
# Seconds that all processes have to end after the first one has ended.
PARTING = 60

LOST = "another process of the run has ended or cannot be reached"
AGAIN = "start all processes again with the same command to resume from the newest checkpoint"


class Address(NamedTuple):
    """The address at which the processes of a run connect, as given on the command line."""

    coordinator: str  # HOST:PORT, of process 0
    num_processes: int
    process_id: int


class ElsewhereError(Exception):
    """Another process reports a UserError; this process ends silently."""


def address(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Address | None:
    """Parse --coordinator, --num_processes and --process_id. The result is None if none of them is given.

    --num_processes=1 may be given alone.

    Raises:
      UserError: if an argument is missing or invalid.

    Example:
      >>> address("10.0.0.1:1234", 2, 0)
      Address(coordinator='10.0.0.1:1234', num_processes=2, process_id=0)
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if num_processes == 1 and coordinator is process_id is None:
        return Address("", 1, 0)
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(
            f"{' and '.join(missing)}: found none, allowed: all three of {', '.join(given)} or none, or "
            "--num_processes=1"
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator: found {coordinator!r}, allowed: HOST:PORT of process 0")
    if num_processes < 1:
        raise UserError(f"--num_processes: found {num_processes}, allowed: 1 or more")
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id: found {process_id}, allowed: 0 to {num_processes - 1}")
    return Address(coordinator, num_processes, process_id)


def join(where: Address | None) -> None:
    """Connect to the other processes of the run. Call this before JAX's first operation.

    The process ends with status 2 if the others do not connect within `MEETING` seconds.

    Args:
      where: the address from the command line. With None, JAX detects the cluster (SLURM, Open MPI, TPU
        pods, Kubernetes) and connects if it has started several processes. A single process does not connect.

    Raises:
      UserError: if a cluster is detected but not its number of processes.
    """
    if where is None:
        if _detected_processes() == 1:
            return
        filter_stderr(*_messages())
        arguments: dict[str, Any] = {}
    elif where.num_processes == 1:
        return
    else:
        filter_stderr(*_messages())
        arguments = {
            "coordinator_address": where.coordinator,
            "num_processes": where.num_processes,
            "process_id": where.process_id,
            "cluster_detection_method": "deactivate",
        }
    try:
        with _ended_by_ctrl_c():
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=MEETING,
                heartbeat_timeout_seconds=HEARTBEAT,
                shutdown_timeout_seconds=PARTING,
            )
    except (RuntimeError, ValueError, OSError) as error:
        _leave(2, f"the processes of the run cannot connect: {error}")
    if not first():
        name = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{name}: process 0 reports the progress", file=sys.stderr, flush=True)


def _messages() -> tuple[str, str]:
    """Return the replacements for XLA's output about a lost process, and about one that did not connect."""
    return (
        f"error: {LOST}; {AGAIN}\n",
        f"error: the processes of the run did not connect within {MEETING} s\n",
    )


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Let SIGINT end the process: Python would see it only after the wait in C++ is over."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _detected_processes() -> int:
    """Return how many processes the cluster has started, as JAX detects it; 1 without a cluster."""
    try:
        from jax._src.clusters import ClusterEnv  # used by initialize() itself; there is no public API
    except ImportError:  # in later versions of JAX: use the command line instead
        return 1
    try:
        for cluster in ClusterEnv._cluster_types:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count()
    except Exception as error:  # a cluster's own library may raise anything
        raise UserError(
            f"found a cluster but not its number of processes ({error}), allowed: --coordinator, "
            "--num_processes and --process_id; or --num_processes=1 to run this process alone"
        ) from error
    return 1


def several() -> bool:
    """Return whether the run has several processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Return whether this process writes the files of the run and reports its progress."""
    return jax.process_index() == 0


def of_first(values: Sequence[int]) -> list[int]:
    """Return process 0's `values` (int32) on all processes. All processes must call this."""
    if not several():
        return list(values)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(values))))
    mine = np.resize(np.array(values, np.int32), count) if first() else np.zeros(count, np.int32)
    return multihost_utils.broadcast_one_to_all(mine).tolist() if count else []


def everywhere(holds: bool) -> bool:
    """Return whether `holds` is true on every process. All processes must call this."""
    return bool(np.all(multihost_utils.process_allgather(np.int32(holds)))) if several() else holds


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Make the block succeed on all processes or on none. All processes must enter it.

    Raises:
      UserError: the one that this process raised.
      ElsewhereError: if another process raised a UserError and this one did not. Also if process 0 raised
        one, so that the same error is not reported twice.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    if several():
        failed = multihost_utils.process_allgather(np.int32(mine is not None))
        if np.any(failed) and (mine is None or (failed[0] and not first())):
            raise ElsewhereError
    if mine is not None:
        raise mine


def stop_together(here: threading.Event) -> Callable[[], bool]:
    """Return a function that says whether the run should stop now, with the same answer on all processes.

    Args:
      here: set when this process should stop. With several processes it is ignored: JAX's preemption service
        handles SIGTERM.

    Returns:
      A function that all processes must call at the same points of the program.
    """
    if not several():
        return here.is_set
    calls = itertools.count()
    stopped = False

    def stop() -> bool:
        nonlocal stopped
        # Calls are numbered: all processes stop at the first number that none of them has reached.
        stopped = stopped or multihost_utils.reached_preemption_sync_point(next(calls))
        return stopped

    return stop


def is_lost(error: BaseException) -> bool:
    """Return whether an error of a collective or of Orbax means that another process is gone."""
    if isinstance(error, OSError) and error.filename is not None:  # a path may contain the names below
        return False
    words = str(error).lower()
    return several() and any(
        name in words for name in ("gloo", "nccl", "coordination", "socket closed", "barrier")
    )


def lost(error: BaseException) -> str:
    """Describe an error for which `is_lost` is true, by its first line."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{LOST} ({reason[:300]}); {AGAIN}"


def leave(status: int, message: str | None = None) -> None:
    """With several processes, end this one at once. Otherwise they would wait for each other."""
    if several():
        _leave(status, message)


def _leave(status: int, message: str | None) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if message is not None:
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"error: {' '.join(message.split())[:2000]}\n".encode(errors="backslashreplace"))
    os._exit(status)
