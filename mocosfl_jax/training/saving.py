"""Communication saving by loss (`loss_threshold` of the official code of Li et al. 2023).

When an epoch has hardly lowered the loss, the next one sends no gradients back to the clients, and the one
after that sends nothing: the server trains on smashed data that it has kept, in shuffled order.
"""

import enum
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.errors import DiskFullError, UserError


class Traffic(enum.StrEnum):
    """What passes the cut in an epoch."""

    BOTH_WAYS = "A"  # smashed data up, gradients down
    UP_ONLY = "B"  # smashed data up, which the server keeps; clients are not trained
    NONE = "C"  # the server replays what it has kept


def next_traffic(
    traffic: Traffic, loss: float, last_loss: float, *, epoch: int, threshold: float, warmup_epochs: int
) -> Traffic:
    """What the epoch after `epoch` (1, 2, ...) sends.

    One state further along A, B, C if the loss fell by less than `threshold`, and back to A if by more.

    Args:
      traffic: of the epoch that has ended.
      loss: its mean loss.
      last_loss: the mean loss of the epoch before; infinite if there was none.
      epoch: how many epochs have ended.
      threshold: 0 never saves.
      warmup_epochs: epochs after which A follows in any case.
    """
    if epoch <= warmup_epochs or max(last_loss - loss, 0.0) >= threshold:
        return Traffic.BOTH_WAYS
    return Traffic.UP_ONLY if traffic is Traffic.BOTH_WAYS else Traffic.NONE


def gibibytes(arrays: jax.ShapeDtypeStruct) -> float:
    """Size of a store of this shape and dtype."""
    return arrays.size * arrays.dtype.itemsize / 2**30


class Store:
    """The smashed data of one epoch, in a file: [steps, 2, n, h, w, c] of query and key views.

    The operating system keeps in memory what fits there. The file is named after its epoch, so that a run
    that resumes from before another one was kept cannot replay the wrong one.
    """

    def __init__(self, folder: Path, arrays: jax.ShapeDtypeStruct) -> None:
        self.folder, self.arrays = folder, arrays

    def path(self, epoch: int) -> Path:
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
        """Keep the smashed data of a step of `epoch`, and of that epoch only."""
        path = self.path(epoch)
        if not path.exists():
            for other in self._kept():
                other.unlink()
        file = self._open(path, "r+" if path.exists() else "w+")
        file[step, 0], file[step, 1] = smashed.query, smashed.key

    def read(self, epoch: int, step: int) -> SmashedData:
        """The smashed data of a step of `epoch`, as it was kept.

        Raises:
          UserError: if the file is gone or another one.
        """
        path = self.path(epoch)
        if not path.exists():
            raise UserError(f"{path}: the run was in an epoch of replay and this file is gone")
        return SmashedData(*np.array(self._open(path, "r")[step]))

    def _kept(self) -> list[Path]:
        return list(self.folder.glob("replay_*.npy"))

    def _open(self, path: Path, mode: str) -> np.memmap:
        if mode == "w+":
            try:
                file = np.lib.format.open_memmap(path, mode, self.arrays.dtype, self.arrays.shape)
                # A write into a mapped file that finds no room kills the process.
                if hasattr(os, "posix_fallocate"):
                    with path.open("r+b") as whole:
                        os.posix_fallocate(whole.fileno(), 0, path.stat().st_size)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise DiskFullError(f"{path}: {gibibytes(self.arrays):.3g} GiB, {error.strerror}") from error
            return file
        file = np.lib.format.open_memmap(path, mode)
        shape, dtype = self.arrays.shape, self.arrays.dtype
        if file.shape != shape:
            raise UserError(f"{path}: found {file.shape}, the run's smashed data are {shape}")
        if file.dtype.itemsize != dtype.itemsize:
            raise UserError(f"{path}: found {file.dtype}, the run's smashed data are {dtype}")
        return file.view(dtype)  # NumPy's format has no name for bfloat16: it is read as two bytes
