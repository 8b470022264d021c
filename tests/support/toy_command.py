"""The train command with the toy network: `python -m tests.support.toy_command ARGUMENTS`."""

import os
import pathlib
import resource
import sys
from typing import Any

import jax
import numpy as np

from mocosfl_jax import train
from mocosfl_jax.data import Images
from mocosfl_jax.data.images import OnDisk
from mocosfl_jax.feed import batches
from mocosfl_jax.runtime import hosts
from mocosfl_jax.training import checkpoint
from tests.support.toy import with_toy


def recording(images: Images, folder: str) -> OnDisk:
    """Images that record in a file of this process which rows are read."""
    path = pathlib.Path(folder) / f"rows_{jax.process_index()}"

    def read(rows: np.ndarray) -> np.ndarray:
        with path.open("a") as file:
            file.write("".join(f"{row}\n" for row in rows))
        return images[rows]

    return OnDisk(images.shape, read, lambda: images[:])


def fill_disk(process: int, steps: range) -> None:
    """Make the operating system limit the size of files while a process saves one of these steps."""
    save = checkpoint.save
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def saving(manager: Any, state: Any, progress: checkpoint.Progress) -> None:
        checkpoint.finish(manager)
        full = jax.process_index() == process and progress.step in steps
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if full else hard, hard))
        save(manager, state, progress)

    checkpoint.save = saving
    checkpoint.AGREEING = 2


def main() -> int:
    if folder := os.environ.get("TOY_ROWS"):
        streamed = batches.streamed
        batches.streamed = lambda images, *rest, **how: streamed(recording(images, folder), *rest, **how)
    if full := os.environ.get("TOY_FULL_DISK"):
        process, first, end = map(int, full.split())
        fill_disk(process, range(first, end))
    # A killed process is noticed, and a missing process is given up, within seconds.
    hosts.HEARTBEAT, hosts.MEETING, hosts.PARTING = int(os.environ.get("TOY_HEARTBEAT", "20")), 10, 20
    return train.main(with_toy(sys.argv))


if __name__ == "__main__":
    sys.exit(main())
