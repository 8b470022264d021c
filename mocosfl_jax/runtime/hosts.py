"""A run of several processes, one on each host or device: how they meet, agree, stop and part.

JAX's distributed runtime does the work. With one process there is none of it.
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

# Seconds. A process that has not been heard of for so long is taken for dead, and the others end.
HEARTBEAT = 60
# For all processes to come to the coordinator, at the start.
MEETING = 300
# For all processes to end, after the first has.
PARTING = 60

LOST = "another process of the run has ended or cannot be reached"
AGAIN = "start all of them again with the same command, which goes on from the newest checkpoint"


class Address(NamedTuple):
    """Where a process meets the others, by the command line."""

    coordinator: str  # HOST:PORT, of process 0
    num_processes: int
    process_id: int


class ElsewhereError(Exception):
    """Another process has an error of the user's to tell; this one ends with it."""


def address(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Address | None:
    """What --coordinator, --num_processes and --process_id say; None where none of them is given.

    --num_processes=1 needs no other.

    Raises:
      UserError: if some are missing or cannot be.
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
    """Meet the other processes of the run. Call before JAX's first operation.

    Args:
      where: by the command line; None: as JAX detects it (SLURM, Open MPI, TPU pods, Kubernetes), if that
        says that there are several processes. With one process, nothing happens.

    Raises:
      UserError: if they do not meet within `MEETING` seconds, or what is detected cannot be.
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
        _leave(2, f"the processes of the run do not meet: {error}")
    if not first():
        name = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"{name}: process 0 tells how the run goes", file=sys.stderr, flush=True)


def _messages() -> tuple[str, str]:
    """What `filter_stderr` writes in place of what XLA writes of a lost process, and of one that did not come."""
    return (
        f"error: {LOST}; {AGAIN}\n",
        f"error: the processes of the run did not meet within {MEETING} s\n",
    )


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Within, SIGINT ends the process: Python would hear of it only when C++ has waited to the end."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _detected_processes() -> int:
    """How many processes the surroundings have started, as JAX detects it; 1 where it detects nothing."""
    try:
        from jax._src.clusters import ClusterEnv  # what initialize() itself asks; there is no public way
    except ImportError:  # of a JAX to come: the command line can still say it
        return 1
    try:
        for cluster in ClusterEnv._cluster_types:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count()
    except Exception as error:  # of any kind, from a cluster's own library
        raise UserError(
            f"found a cluster and not how many processes it has started ({error}), allowed: --coordinator, "
            "--num_processes and --process_id; --num_processes=1 is a run of this process alone"
        ) from error
    return 1


def several() -> bool:
    """Whether the run has several processes."""
    return jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes files and tells how the run goes."""
    return jax.process_index() == 0


def of_first(values: Sequence[int]) -> list[int]:
    """What process 0 calls this with (int32), on all processes. All have to call it."""
    if not several():
        return list(values)
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(values))))
    mine = np.resize(np.array(values, np.int32), count) if first() else np.zeros(count, np.int32)
    return multihost_utils.broadcast_one_to_all(mine).tolist() if count else []


def everywhere(holds: bool) -> bool:
    """Whether it holds on every process. All have to call it."""
    return bool(np.all(multihost_utils.process_allgather(np.int32(holds)))) if several() else holds


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What is within succeeds on all processes or on none. All have to enter.

    Raises:
      UserError: that of this process.
      ElsewhereError: another one has a UserError, and this one none, or it would only repeat process 0's.
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
    """Whether the run is to stop now, with the same answer on all processes.

    Args:
      here: set when this process is to stop; with several, JAX's preemption service hears SIGTERM instead.

    Returns:
      A function that all processes have to call at the same points of the program.
    """
    if not several():
        return here.is_set
    calls = itertools.count()
    stopped = False

    def stop() -> bool:
        nonlocal stopped
        # The point at which all stop is a number of this call that none has passed.
        stopped = stopped or multihost_utils.reached_preemption_sync_point(next(calls))
        return stopped

    return stop


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of a collective, or of Orbax, whose other side is gone."""
    if isinstance(error, OSError) and error.filename is not None:  # the names below may be in a path
        return False
    words = str(error).lower()
    return several() and any(
        name in words for name in ("gloo", "nccl", "coordination", "socket closed", "barrier")
    )


def lost(error: BaseException) -> str:
    """What is told of an error that `is_lost`; its first line may say that it was a network, say."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{LOST} ({reason[:300]}); {AGAIN}"


def leave(status: int, message: str | None = None) -> None:
    """With several processes, end this one at once: it would wait for the others, which wait for it."""
    if several():
        _leave(status, message)


def _leave(status: int, message: str | None) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    if message is not None:
        os.write(2, f"error: {' '.join(message.split())[:2000]}\n".encode())
    os._exit(status)
