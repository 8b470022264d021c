"""Loss-based communication saving (`loss_threshold` in the official code of Li et al. 2023).

If an epoch hardly lowers the loss, the next epoch sends no gradients back to the clients, and the one after
that sends nothing: the server trains on smashed data that it has kept, in shuffled order.
"""

import enum
import os
import shutil
import zlib
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.errors import DiskFullError, UserError


class Traffic(enum.StrEnum):
    """What is sent across the cut in an epoch."""

    BOTH_WAYS = "A"  # smashed data up, gradients down
    UP_ONLY = "B"  # smashed data up, kept by the server; the clients are not trained
    NONE = "C"  # the server replays the smashed data that it kept


def next_traffic(
    traffic: Traffic, loss: float, last_loss: float, *, epoch: int, threshold: float, warmup_epochs: int
) -> Traffic:
    """Return the traffic of the epoch after `epoch` (1, 2, ...).

    It moves one state along A, B, C if the loss fell by less than `threshold`; otherwise it returns to A.

    Args:
      traffic: of the epoch that has ended.
      loss: mean loss of that epoch.
      last_loss: mean loss of the epoch before; infinite if there was none.
      epoch: number of epochs that have ended.
      threshold: smallest decrease of the loss that keeps full traffic; 0 never saves.
      warmup_epochs: number of epochs after which A always follows.

    Returns:
      The traffic of the next epoch.

    Example:
      >>> next_traffic(Traffic.BOTH_WAYS, 7.20, 7.21, epoch=5, threshold=0.05, warmup_epochs=2).name
      'UP_ONLY'
    """
    if epoch <= warmup_epochs or max(last_loss - loss, 0.0) >= threshold:
        return Traffic.BOTH_WAYS
    return Traffic.UP_ONLY if traffic is Traffic.BOTH_WAYS else Traffic.NONE


def gibibytes(arrays: jax.ShapeDtypeStruct) -> float:
    """Return the size of arrays of this shape and dtype in GiB."""
    return arrays.size * arrays.dtype.itemsize / 2**30


class Store:
    """The smashed data of one epoch, in a file: [steps, 2, n, h, w, c] of query and key views.

    The array, in NumPy's format, is followed by a CRC-32 for each step, as little-endian uint32 [steps].

    The operating system caches as much of the file as fits in memory. The file name contains the epoch, so
    that a run resumed from an earlier checkpoint cannot replay the wrong one.
    """

    def __init__(self, folder: Path, arrays: jax.ShapeDtypeStruct) -> None:
        self.folder, self.arrays = folder, arrays

    def path(self, epoch: int) -> Path:
        """Return the path of the file for `epoch`."""
        return self.folder / f"replay_{epoch}.npy"

    def require_space(self) -> None:
        """Raise UserError if the disk has no room for the file."""
        size = gibibytes(self.arrays)
        there = sum(path.stat().st_size for path in self._kept()) / 2**30
        free = shutil.disk_usage(self.folder).free / 2**30
        if size > free + there:
            raise UserError(
                f"{self.folder}: found {free:.3g} GiB free, {size:.3g} GiB are needed for smashed data"
            )

    def write(self, epoch: int, step: int, smashed: SmashedData) -> None:
        """Keep the smashed data of a step of `epoch`, and delete that of other epochs.

        Raises:
          DiskFullError: if the disk has no room for the file.
        """
        path = self.path(epoch)
        if not path.exists():
            for other in self._kept():
                other.unlink()
        file, checksums = self._open(path, "r+" if path.exists() else "w+")
        file[step, 0], file[step, 1] = smashed.query, smashed.key
        checksums[step] = _checksum(file[step])

    def read(self, epoch: int, step: int) -> SmashedData:
        """Return the smashed data of a step of `epoch`, as it was kept.

        Raises:
          UserError: if the file is missing, has another shape or dtype, or is damaged.
        """
        path = self.path(epoch)
        if not path.exists():
            raise UserError(f"{path}: this file is missing, but the run stopped in an epoch that replays it")
        file, checksums = self._open(path, "r")
        kept = np.array(file[step])
        if _checksum(kept) != checksums[step]:
            raise UserError(f"{path}: damaged, the smashed data of step {step} are not those that were kept")
        return SmashedData(*kept)

    def _kept(self) -> list[Path]:
        return list(self.folder.glob("replay_*.npy"))

    def _open(self, path: Path, mode: Literal["r", "r+", "w+"]) -> tuple[np.ndarray, np.ndarray]:
        """Map the array and its checksums; "w+" makes the file."""
        shape, dtype = self.arrays.shape, self.arrays.dtype
        if mode == "w+":
            try:
                file = np.lib.format.open_memmap(path, mode, dtype, shape)
                size = file.offset + file.nbytes + 4 * shape[0]
                with path.open("r+b") as whole:
                    whole.truncate(size)
                    # Reserve the space: writing to a mapped file on a full disk would kill the process.
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(whole.fileno(), 0, size)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise DiskFullError(f"{path}: {gibibytes(self.arrays):.3g} GiB, {error.strerror}") from error
            return file, np.memmap(path, "<u4", "r+", size - 4 * shape[0], shape[0])
        try:
            file = np.lib.format.open_memmap(path, mode)
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error})") from error
        if file.shape != shape:
            raise UserError(f"{path}: found {file.shape}, allowed: {shape}, that of the run's smashed data")
        if file.dtype.itemsize != dtype.itemsize:
            raise UserError(f"{path}: found {file.dtype}, allowed: {dtype}, that of the run's smashed data")
        end = file.offset + file.nbytes
        if (found := path.stat().st_size) != end + 4 * shape[0]:
            raise UserError(f"{path}: damaged, found {found:,} bytes, allowed: {end + 4 * shape[0]:,}")
        # NumPy's format lacks bfloat16 and reads it as two raw bytes.
        return file.view(dtype), np.memmap(path, "<u4", mode, end, shape[0])


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)
