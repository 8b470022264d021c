"""One run of two processes that is killed again and again: `pytest -m soak -n 0 -s tests/test_soak.py`.

SOAK_KILLS says how often (200), SOAK_SEED which ones.
"""

import collections
import os
import pathlib
import re
import signal
import subprocess
import time

import numpy as np
import pytest
from test_hosts import arguments, assert_same, data, newest, parameters, start
from test_loop import comparable

from mocosfl_jax import workdir

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("compilation_cache")]
__all__ = ["data"]  # a fixture

KILLS, SEED = int(os.environ.get("SOAK_KILLS", "200")), int(os.environ.get("SOAK_SEED", "0"))
SHARE_IN_SAVES = 0.4  # of the kills that wait for a checkpoint to be begun
TRAINING = 4.0  # seconds after the start of a run's first step within which the others come
PATIENCE = 90  # seconds for the other process to end


def begin(argv: list[str], folder: pathlib.Path) -> list[subprocess.Popen]:
    """Start both; what they say goes to files."""
    return start(argv, said=folder.parent)


def said(folder: pathlib.Path, process: int) -> str:
    return (folder.parent / f"out_{process}").read_text()


def begun(folder: pathlib.Path) -> set[str]:
    """Checkpoints that are not complete."""
    return {path.name for path in (folder / "checkpoints").glob("*tmp*")}


def complete(folder: pathlib.Path) -> int:
    """The step of the newest complete checkpoint, -1 before the first."""
    try:
        return newest(folder)
    except (FileNotFoundError, ValueError):
        return -1


def where(processes: list[subprocess.Popen], folder: pathlib.Path, left: set[str]) -> str:
    """What the run is doing now."""
    if all(process.poll() is not None for process in processes):
        return "after the end"
    if begun(folder) - left:
        return "in a save"
    return "in training" if "compiled the step" in said(folder, 0) else "before the first step"


def wait_for_the_moment(
    processes: list[subprocess.Popen], folder: pathlib.Path, rng: np.random.Generator, left: set[str]
) -> None:
    """Until a random moment: while a checkpoint is written, or any within the start and some rounds."""
    clock = time.monotonic()
    if rng.random() < SHARE_IN_SAVES:
        while not begun(folder) - left and any(process.poll() is None for process in processes):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        return
    wait = rng.uniform(0, 1)
    started = None
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if started is None and "compiled the step" in said(folder, 0):
            started = now
        # One in four comes during the start, whose length is that of the starts before.
        if wait < 0.25 and now - clock > wait * 4 * wait_for_the_moment.start:  # type: ignore[attr-defined]
            return
        if started is not None:
            wait_for_the_moment.start = started - clock  # type: ignore[attr-defined]
            if now - started > (wait - 0.25) / 0.75 * TRAINING:
                return
        time.sleep(0.005)


wait_for_the_moment.start = 10.0  # type: ignore[attr-defined]
