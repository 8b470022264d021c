"""Saving and resuming a run with Orbax: the whole TrainState and where the run stands.

A checkpoint appears under its step number when it is complete, never before.
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

from mocosfl_jax.algorithm.interface import TrainState
from mocosfl_jax.errors import DiskFullError, UserError, is_disk_full
from mocosfl_jax.runtime import hosts

_MARGIN = 2**20  # bytes that a checkpoint takes beside the arrays, at most
# Seconds in which all processes, having written, say that they could. Longer than `hosts.HEARTBEAT`, so that
# one that has died is told as such.
AGREEING = 90


class Progress(NamedTuple):
    """Where a run stands, beside its TrainState. Plain numbers, saved as JSON."""

    step: int = 0  # training steps done
    losses: tuple[float, ...] = ()  # of the steps of the epoch that is under way
    top1s: tuple[float, ...] = ()
    epoch_seconds: float = 0.0  # of training in the epoch that is under way
    metrics_lines: int = 0  # lines of metrics.jsonl that belong to this checkpoint
    traffic: str = "A"  # what passes the cut in the epoch that is under way (`saving.Traffic`)
    last_loss: float = math.inf  # mean of the epoch before
    kept_epoch: int = 0  # the epoch of which smashed data are kept
    unwritten: tuple[dict[str, float], ...] = ()  # lines of metrics.jsonl for which the disk had no room


def open_manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The manager of the checkpoints in `folder`, which keeps the newest `keep` of them."""
    together: dict[str, Any] = {}
    if hosts.several():
        # Folders are made while all processes look on: afterwards one that failed could not be met.
        together["async_options"] = ocp.options.AsyncOptions(
            barrier_sync_fn=_Barriers(), create_directories_asynchronously=False
        )
    # What a killed run has begun to write goes.
    return _manager(
        folder, ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, **together)
    )


def _manager(folder: Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    logging.get_absl_logger().addFilter(_raised_anyway)
    handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
    return _Manager(folder.absolute(), options=options, item_handlers=handlers)


def _raised_anyway(record: LogRecord) -> bool:
    """Leaves out the traces that Orbax logs of what it raises too: the command tells that in a line."""
    return not (record.exc_info and "orbax" in record.pathname)


class _Manager(ocp.CheckpointManager):
    """Asks nobody whether the run is about to stop.

    With several processes that is asked once a round (`hosts.stop_together`), with the number of the call.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class _Barriers:
    """Where the processes of a run wait for each other while Orbax saves, so that a failure is known to all.

    All wait twice: until each has written, and until process 0 has made the checkpoint complete. A process
    that cannot do its part would not come, and the others would wait for it for twenty minutes. Here it comes
    as well, on its way to the end of the save, and then stays away from a second barrier, by which the others
    know. The three names are Orbax's; of others, each barrier would be the plain one.
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
            elif self._passed < 2 and not self._failed:  # it ends here, before its time
                self._failed = True
                self._meet(timeout_ms)
        self._wait(key=key, timeout_ms=timeout_ms)

    def _meet(self, timeout_ms: int) -> str:
        place = f"mocosfl_jax/save_{self._saves}/{self._passed}"
        self._wait(key=place, timeout_ms=timeout_ms)
        return place


def _manager_alone(folder: Path) -> ocp.CheckpointManager:
    """A manager that reads, by which each process finds out for itself what can be read."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    # Without Orbax's read_only, which comes with warnings: a manager that does not save writes nothing.
    return _manager(folder, ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone))


def save(manager: ocp.CheckpointManager, state: TrainState, progress: Progress) -> None:
    """Save in the background; `state` may be donated as soon as this returns.

    Raises:
      DiskFullError: the disk has no room for it, or had none for the one before. What was saved before
        those is as it was, and the same manager can save again.
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
    with _full_disk_told(manager, agreed=False):
        manager.save(
            progress.step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                # A string, since Python writes and reads every float exactly.
                progress=ocp.args.JsonSave({"record": json.dumps(record)}),
            ),
        )


def finish(manager: ocp.CheckpointManager) -> None:
    """Wait until the checkpoint that is being saved is complete.

    Raises:
      DiskFullError: it found no room; what was saved before is as it was.
    """
    with _full_disk_told(manager, agreed=True):
        manager.wait_until_finished()


@contextlib.contextmanager
def _full_disk_told(manager: ocp.CheckpointManager, *, agreed: bool) -> Iterator[None]:
    """Turn what Orbax raises on a full disk into DiskFullError, and give back the room of what it began.

    With several processes it is DiskFullError on all of them, if `agreed`: what is within fails on all or on
    none (`_Barriers`). Otherwise it is OSError, since the others have not met it and wait.
    """
    try:
        yield
    except Exception as error:  # of any kind, by the library that met it
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
        hosts.everywhere(True)  # it is gone before anybody looks
        # Of older ones it has already forgotten those that were to make way.
        manager.reload()
        raise DiskFullError(message) from error


def restore_newest(manager: ocp.CheckpointManager, like: TrainState) -> tuple[TrainState, Progress] | None:
    """The newest checkpoint that can be read, or None if there is none at all.

    Newer ones that are damaged are warned of and moved out of the way, to the folder above, so that their
    steps can be saved again.

    Args:
      manager: of `open_manager`.
      like: a state of the same shapes, dtypes and placement. Its mesh need not be that of the run so far.

    Raises:
      UserError: if there are checkpoints but none can be read, or if it is of another network.
    """
    steps = hosts.of_first(sorted(manager.all_steps(), reverse=True))
    if not steps:
        return None
    folder = Path(manager.directory)
    with _manager_alone(folder) as reader:
        state, progress, damaged = _first_readable(reader, steps, like)
    if hosts.first():
        for step in damaged:
            (folder / str(step)).rename(_free(folder.parent / f"damaged_checkpoint_{step}"))
    hosts.everywhere(True)  # they are gone before anybody looks
    manager.reload()
    return state, progress


def _free(path: Path) -> Path:
    """`path`, or where there is something already, with a number behind it."""
    others = (path.with_name(f"{path.name}_{number}") for number in itertools.count(2))
    return next(p for p in itertools.chain([path], others) if not p.exists())


def restore(
    folder: Path, step: int | None, init: Callable[[Array], TrainState], device: jax.Device
) -> tuple[TrainState, Progress]:
    """One checkpoint, to look at: nothing in `folder` changes, and a training there may go on.

    Args:
      folder: of the checkpoints.
      step: whose checkpoint; None: the newest that can be read, with a warning of damaged newer ones.
      init: of the algorithm; it is not run, its state has the shapes and dtypes.
      device: where the state goes.

    Returns:
      State and progress.

    Raises:
      UserError: if there is no such checkpoint, it cannot be read, or it is of another network.
    """
    steps = sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)
    if not steps:
        raise UserError(f"{folder}: found no checkpoint")
    if step is not None and step not in steps:
        raise UserError(f"--checkpoint: found {step}, allowed: {', '.join(map(str, steps))}")
    place = SingleDeviceSharding(device)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(init, jax.random.key(0)),
    )
    with _manager_alone(folder) as manager:
        state, progress, _ = _first_readable(manager, steps if step is None else [step], like)
    return state, progress


def _first_readable(
    manager: ocp.CheckpointManager, steps: Sequence[int], like: TrainState
) -> tuple[TrainState, Progress, list[int]]:
    """The first of these checkpoints that can be read by all processes, and the damaged ones before it."""
    damaged: list[int] = []
    for step in steps:
        found = None
        try:
            found = _restore(manager, step, like)
            reason = "its arrays are not those that were saved"
        except (MemoryError, PermissionError, UserError):
            raise
        except Exception as error:  # whatever Orbax meets in a damaged file
            if "RESOURCE_EXHAUSTED" in str(error):  # the checkpoint is as good as it was
                raise
            reason = str(error).split("\n", 1)[0][:120]
        # What was saved is compared by all processes together.
        if hosts.everywhere(found is not None):
            assert found is not None
            state, record = found
            if record.pop("fingerprint", None) == int(_fingerprint(state)):
                lists = {name: tuple(record[name]) for name in ("losses", "top1s", "unwritten")}
                return state, Progress(**record | lists), damaged
        if hosts.first():
            logging.warning("checkpoint %d is damaged and skipped (%s)", step, reason)
        damaged.append(step)
    raise UserError(f"{manager.directory}: no checkpoint can be read, of {', '.join(map(str, steps))}")


def _restore(
    manager: ocp.CheckpointManager, step: int, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """State, and the record of its progress with its fingerprint, which is not compared yet."""
    _require_same_shapes(manager, step, like)
    restored = manager.restore(
        step,
        # Not strict: a state that was at rest on a mesh may have clients of zeros behind the others, and one
        # that will be may want them.
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(like, strict=False), progress=ocp.args.JsonRestore()
        ),
    )
    return restored.state, json.loads(restored.progress["record"])


def _require_same_shapes(manager: ocp.CheckpointManager, step: int, like: TrainState) -> None:
    """Raise UserError unless the checkpoint's arrays are those of `like`, but for the number of clients."""
    saved, wanted = _shapes(manager.item_metadata(step)["state"].tree), _shapes(like)
    clients = tuple(shapes[("clients", "scales")][0] for shapes in (saved, wanted))
    for path in sorted(saved.keys() | wanted.keys()):
        found, allowed = saved.get(path), wanted.get(path)
        if found == allowed:
            continue
        stacked = found and allowed and (found[0], allowed[0]) == clients and found[1:] == allowed[1:]
        if not stacked:
            raise UserError(
                f"{manager.directory / str(step)}: found {'/'.join(path)} of shape {found}, "
                f"allowed: {allowed}, that of the configuration"
            )


def _shapes(tree: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of each leaf, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        tuple(jax.tree_util.keystr((part,), simple=True) for part in path): leaf.shape
        for path, leaf in leaves
    }


@jax.jit
def _fingerprint(tree: Any) -> Array:
    """Sum of all bits as 32-bit words, each leaf with an odd factor of its own: shows a flipped bit."""

    def words(leaf: Array) -> Array:
        return jax.lax.bitcast_convert_type(leaf, jnp.uint32).ravel()

    total = jnp.uint32(0)
    for i, leaf in enumerate(jax.tree.leaves(tree)):
        total += np.uint32(2 * i + 1) * jnp.sum(words(leaf), dtype=jnp.uint32)
    return total
