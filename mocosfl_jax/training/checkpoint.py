"""Saves and restores a run with Orbax: the whole TrainState and the progress of the run.

A checkpoint appears under its step number only when it is complete.
"""

import contextlib
import itertools
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from logging import LogRecord
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax import Array
from jax.sharding import SingleDeviceSharding

from mocosfl_jax.algorithm.interface import Algorithm, TrainState
from mocosfl_jax.errors import DiskFullError, UserError, is_disk_full
from mocosfl_jax.runtime import hosts
from mocosfl_jax.training import workdir

_MARGIN = 2**20  # bytes, an upper bound for all files of a checkpoint except the arrays
# Seconds that all processes have to confirm that they have written. Longer than `hosts.HEARTBEAT`, so that a
# dead process is reported as such.
AGREEING = 90


Homes = Callable[[TrainState], Any]  # `Algorithm.homes`


class Progress(NamedTuple):
    """The progress of a run, besides its TrainState: plain numbers, saved as JSON."""

    step: int = 0  # training steps done
    losses: tuple[float, ...] = ()  # of the steps of the current epoch
    top1s: tuple[float, ...] = ()
    epoch_seconds: float = 0.0  # of training in the current epoch
    metrics_lines: int = 0  # lines of metrics.jsonl that belong to this checkpoint
    traffic: str = "A"  # in the current epoch (`saving.Traffic`)
    last_loss: float = math.inf  # mean of the previous epoch
    kept_epoch: int = 0  # the epoch whose smashed data is kept
    unwritten: tuple[dict[str, float], ...] = ()  # lines of metrics.jsonl that did not fit on the disk


def open_manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """Open the manager of the checkpoints in `folder`, which keeps the newest `keep` of them."""
    together: dict[str, Any] = {}
    if hosts.several():
        # Folders are created synchronously, since a failure in the background could not be agreed on.
        together["async_options"] = ocp.options.AsyncOptions(
            barrier_sync_fn=_Barriers(), create_directories_asynchronously=False
        )
    # Incomplete checkpoints of a killed run are deleted.
    return _manager(
        folder, ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, **together)
    )


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    logging.get_absl_logger().addFilter(_no_duplicate_traceback)
    handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    return _Manager(folder.absolute(), options=options, item_handlers=handlers)


def _no_duplicate_traceback(record: LogRecord) -> bool:
    """Drop tracebacks that Orbax logs and also raises: the command reports those errors in one line."""
    return not (record.exc_info and "orbax" in record.pathname)


class _Manager(ocp.CheckpointManager):
    """Never asks whether the run is about to stop.

    With several processes, only `hosts.stop_together` may ask, once a round, since its calls are numbered.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _Barriers:
    """Barriers between the processes while Orbax saves, which let all of them know about a failure.

    The processes wait twice: until each has written, and until process 0 has completed the checkpoint. With
    Orbax's own barriers, a process that fails does not arrive, and the others wait for it for twenty minutes.
    Here it arrives too, on its way out of the save, but then stays away from a second barrier, which tells
    the others. The three keys are Orbax's. If it renames them, every barrier is a plain one.
    """

    def __init__(self) -> None:
        self._wait = ocp.multihost.get_barrier_sync_fn()
        self._saves, self._passed, self._failed = 0, 0, False

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        if "async_write_complete" in key or "async_commit_complete" in key:
            place = self._meet(timeout_ms)
            try:
                self._wait(key=f"{place}/all_could", timeout_ms=1000 * AGREEING)
            except Exception:
                self._failed = True
                raise
            self._passed += 1
            return
        if "set_value_start" in key:
            if threading.current_thread() is threading.main_thread():  # a save begins
                self._saves, self._passed, self._failed = self._saves + 1, 0, False
            elif self._passed < 2 and not self._failed:  # this process failed and leaves the save early
                self._failed = True
                self._meet(timeout_ms)
        self._wait(key=key, timeout_ms=timeout_ms)

    def _meet(self, timeout_ms: int) -> str:
        place = f"mocosfl_jax/save_{self._saves}/{self._passed}"
        self._wait(key=place, timeout_ms=timeout_ms)
        return place


def _reader(folder: Path) -> ocp.CheckpointManager:
    """Open a manager that only reads, so that each process finds out for itself what it can read."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    # Orbax's read_only is not set, since it warns. A manager that does not save writes nothing anyway.
    return _manager(folder, ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone))


def save(manager: ocp.CheckpointManager, state: TrainState, progress: Progress) -> None:
    """Save in the background. `state` may be donated as soon as this returns.

    Args:
      manager: from `open_manager`.
      state: all of it is saved.
      progress: its step names the checkpoint.

    Raises:
      DiskFullError: if the disk has no room for this checkpoint, or had none for the previous one. Earlier
        checkpoints are intact, and the same manager can save again.
    """
    finish(manager)
    folder = Path(manager.directory)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _MARGIN
    free = shutil.disk_usage(folder).free
    if any(hosts.of_first([free < needed])):
        raise DiskFullError(
            f"{folder}: no room to save step {progress.step:,}, {needed / 2**20:,.1f} MiB are needed and "
            f"{free / 2**20:,.1f} MiB free"
        )
    record = progress._asdict() | {"fingerprint": int(_fingerprint(state))}
    with _report_full_disk(manager, agreed=False):
        manager.save(
            progress.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                # A string from Python's json, which writes and reads every float exactly.
                progress=ocp.args.JsonSave({"record": json.dumps(record)}),
            ),
        )


def finish(manager: ocp.CheckpointManager) -> None:
    """Wait until the checkpoint being saved is complete.

    Raises:
      DiskFullError: if the disk had no room for it. Earlier checkpoints are intact.
    """
    with _report_full_disk(manager, agreed=True):
        manager.wait_until_finished()


@contextlib.contextmanager
def _report_full_disk(manager: ocp.CheckpointManager, *, agreed: bool) -> Iterator[None]:
    """Turn Orbax's errors on a full disk into DiskFullError, and delete the incomplete checkpoint.

    With several processes, all raise DiskFullError if `agreed`: then the block fails on all processes or on
    none (`_Barriers`). Otherwise this one raises OSError, since the others have no error and wait.
    """
    try:
        yield
    except Exception as error:  # the type depends on the library that fails
        here = is_disk_full(error)
        full = not hosts.everywhere(not here) if agreed else here
        if not full:
            raise
        folder = Path(manager.directory)
        message = f"{folder}: the disk was full before a checkpoint was complete"
        if hosts.several() and not agreed:
            raise OSError(message) from error
        if hosts.first():
            for begun in folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(begun, ignore_errors=True)
        hosts.everywhere(True)  # no process looks at the folder before it is gone
        # The manager has already dropped older checkpoints from its list that it was going to delete.
        manager.reload()
        raise DiskFullError(message) from error


def restore_newest(
    manager: ocp.CheckpointManager, like: TrainState, homes: Homes
) -> tuple[TrainState, Progress] | None:
    """Restore the newest readable checkpoint, or return None if there are no checkpoints.

    Newer ones that are damaged are moved to the parent folder, with a warning, so that their steps can be
    saved again.

    Args:
      manager: from `open_manager`.
      like: shapes, dtypes and placement of the state. Its mesh may differ from that of the run so far.
      homes: of the algorithm. The padding of the clients may differ.

    Returns:
      State and progress.

    Raises:
      UserError: if there are checkpoints but none can be read, or one is of a different network.
    """
    steps = hosts.of_first(sorted(manager.all_steps(), reverse=True))
    if not steps:
        return None
    folder = Path(manager.directory)
    with _reader(folder) as reader:
        state, progress, damaged = _first_readable(reader, steps, like, homes)
    if hosts.first():
        for step in damaged:
            (folder / str(step)).rename(_unused_path(folder.parent / f"damaged_checkpoint_{step}"))
    hosts.everywhere(True)  # no process looks at the folder before they are gone
    manager.reload()
    return state, progress


def _unused_path(path: Path) -> Path:
    """Return `path`, or the path with a number appended if something is there already."""
    others = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], others) if not p.exists())


def restore(
    folder: Path, step: int | None, algorithm: Algorithm, device: jax.Device
) -> tuple[TrainState, Progress]:
    """Restore one checkpoint for reading. Nothing in `folder` changes, and a run may be training there.

    Args:
      folder: the folder of the checkpoints.
      step: of the checkpoint; None: the newest readable one, with a warning about damaged newer ones.
      algorithm: gives the shapes and dtypes of the state. It is not run.
      device: the device for the state.

    Returns:
      State and progress.

    Raises:
      UserError: if the checkpoint does not exist, cannot be read, or is of a different network.
    """
    steps = workdir.chosen_checkpoints(folder, step)
    place = SingleDeviceSharding(device)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(algorithm.init, jax.random.key(0)),
    )
    with _reader(folder) as manager:
        state, progress, _ = _first_readable(manager, steps, like, algorithm.homes)
    return state, progress


def _first_readable(
    manager: ocp.CheckpointManager, steps: Sequence[int], like: TrainState, homes: Homes
) -> tuple[TrainState, Progress, list[int]]:
    """Return the first of the checkpoints that all processes can read, and the damaged ones before it."""
    damaged: list[int] = []
    for step in steps:
        found = None
        try:
            found = _restore(manager, step, like, homes)
            reason = "its arrays differ from those that were saved"
        except (MemoryError, PermissionError, UserError):
            raise
        except Exception as error:  # Orbax may raise anything on a damaged file
            if "RESOURCE_EXHAUSTED" in str(error):  # out of memory: the checkpoint is not damaged
                raise
            reason = str(error).split("\n", 1)[0][:120]
        # The fingerprint is computed by all processes together.
        if hosts.everywhere(found is not None):
            assert found is not None
            state, record = found
            if record.pop("fingerprint", None) == int(_fingerprint(state)):
                lists = {name: tuple(record[name]) for name in ("losses", "top1s", "unwritten")}
                return state, Progress(**record | lists), damaged
        if hosts.first():
            logging.warning("checkpoint %d is damaged and skipped (%s)", step, reason)
        damaged.append(step)
    raise UserError(f"{manager.directory}: none of the checkpoints can be read: {', '.join(map(str, steps))}")


def _restore(
    manager: ocp.CheckpointManager, step: int, like: TrainState, homes: Homes
) -> tuple[TrainState, dict[str, Any]]:
    """Return the state, and the record of its progress with its fingerprint, which the caller compares."""
    _require_same_shapes(manager, step, like, homes)
    restored = manager.restore(
        step,
        # Not strict, since the number of clients may differ: a state at rest on a mesh may be padded with
        # clients of zeros.
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(like, strict=False), progress=ocp.args.JsonRestore()
        ),
    )
    return restored.state, json.loads(restored.progress["record"])


def _require_same_shapes(manager: ocp.CheckpointManager, step: int, like: TrainState, homes: Homes) -> None:
    """Raise UserError unless the checkpoint has the arrays of `like`; the clients' padding may differ."""
    saved, wanted = _leaves(manager.item_metadata(step)["state"].tree), _leaves(like)
    home = _leaves(jax.tree.broadcast(homes(like), like))
    checkpoint = manager.directory / str(step)
    if ("clients", "scales") in saved:
        raise UserError(
            f"{checkpoint}: found the layout of an earlier version, allowed: that of this version; the "
            "version that trained the run can evaluate and export it"
        )
    for path in sorted(saved.keys() | wanted.keys()):
        found, allowed = (leaves[path].shape if path in leaves else None for leaves in (saved, wanted))
        padded = found and allowed and home[path].kind == "clients" and found[1:] == allowed[1:]
        if found != allowed and not padded:
            raise UserError(
                f"{checkpoint}: found {'/'.join(path)} of shape {found}, allowed: {allowed}, that of the "
                "configuration"
            )
        kind, needed = np.dtype(saved[path].dtype), np.dtype(wanted[path].dtype)
        if kind != needed:
            raise UserError(
                f"{checkpoint}: found {'/'.join(path)} in {kind}, allowed: {needed}; JAX_ENABLE_X64 has to "
                "be as it was when the run started"
            )


def _leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """Return the leaves, which have a shape and a dtype, by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(jax.tree_util.keystr((part,), simple=True) for part in path): leaf for path, leaf in leaves}


@jax.jit
def _fingerprint(tree: Any) -> Array:
    """Sum all bits as 32-bit words, with an odd factor per leaf. A flipped bit changes the sum.

    Of a number of 8 or 16 bits, and of a truth value, each is a word.
    """

    def words(leaf: Array) -> Array:
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        bits = 8 * min(leaf.dtype.itemsize, 4)
        return jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{bits}")).astype(jnp.uint32).ravel()

    total = jnp.uint32(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        total += np.uint32(2 * i + 1) * jnp.sum(words(leaf), dtype=jnp.uint32)
    return total
