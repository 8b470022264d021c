"""One run of two processes that is killed repeatedly: `pytest -m soak -n 0 -s tests/test_soak.py`.

SOAK_KILLS sets the number of kills (200), SOAK_SEED the seed of their random numbers. Where processes are
halted for a while, a larger TOY_HEARTBEAT (20 s) keeps them from considering each other dead.
"""

import collections
import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest

from tests.support.processes import Process, arguments, assert_same, newest, start
from tests.support.toy import last_arrays
from tests.support.training import comparable

pytestmark = pytest.mark.soak

KILLS, SEED = int(os.environ.get("SOAK_KILLS", "200")), int(os.environ.get("SOAK_SEED", "0"))
EPOCHS = 5 * KILLS  # so that the run does not end before the last kill
STARTING, TRAINING, SAVING = 10.0, 2.0, 0.05  # a kill comes within this many seconds
PATIENCE = 120  # seconds in which the other process has to end by itself
FIELDS = {"epochs": EPOCHS, "eval.every": 0, "eval.probe_epochs": 0, "checkpoint.keep": 2}


def saving(folder: pathlib.Path) -> bool:
    """Whether a checkpoint has been started and is not complete."""
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def training(processes: list[Process]) -> bool:
    """Whether an epoch has ended since the start, after which nothing more is compiled."""
    return "images/s" in processes[0].out.read_text()


def over(processes: list[Process]) -> bool:
    return all(process.running.poll() is not None for process in processes)


def wait_for_moment(processes: list[Process], folder: pathlib.Path, rng: np.random.Generator) -> None:
    """Wait for a random moment during the start, in training, or while a checkpoint is written."""
    moment, part = rng.choice(["start", "training", "save"]), rng.random()
    clock = time.monotonic()
    if moment == "start":
        while time.monotonic() < clock + part * STARTING and not over(processes):
            time.sleep(0.01)
        return
    while not training(processes) and not over(processes):
        time.sleep(0.01)
    if moment == "training":
        time.sleep(part * TRAINING)
        return
    while not saving(folder) and not over(processes):
        time.sleep(0.0005)
    time.sleep(part * SAVING)


def where(processes: list[Process], folder: pathlib.Path) -> str:
    """What the run is doing now, in words."""
    if over(processes):
        return "after the end"
    if not training(processes):
        return "before its first epoch ended"
    return "in a save" if saving(folder) else "in training"


def steps_saved(folder: pathlib.Path) -> int:
    """The step of the newest complete checkpoint; -1 before the first."""
    try:
        return newest(folder)
    except (FileNotFoundError, ValueError):
        return -1


def test_a_run_survives_kills(two_process_images: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """No completed save is lost, each epoch is reported once, and the end is that of an undisturbed run."""
    more = [f"--config.{name}={value}" for name, value in FIELDS.items()]
    undisturbed = arguments(two_process_images, tmp_path / "undisturbed", *more)
    for process in start(undisturbed, tmp_path):
        assert process.end(3600).status == 0
    rng = np.random.default_rng(SEED)
    folder = tmp_path / "run"
    argv = arguments(two_process_images, folder, *more)
    kills: collections.Counter[tuple[str, str]] = collections.Counter()
    alone: collections.Counter[str] = collections.Counter()  # how the other process ended
    slowest, began = 0.0, time.monotonic()
    for number in range(KILLS):
        before = steps_saved(folder)
        processes = start(argv, tmp_path)
        wait_for_moment(processes, folder, rng)
        kind, victim = signal.Signals(rng.choice([signal.SIGKILL, signal.SIGTERM])), int(rng.integers(2))
        moment = where(processes, folder)
        kills[moment, kind.name] += 1
        processes[victim].running.send_signal(kind)
        clock = time.monotonic()
        hit = processes[victim].end(PATIENCE)
        other = processes[1 - victim].end(PATIENCE)
        slowest = max(slowest, time.monotonic() - clock)
        alone[f"{kind.name} {moment}: status {hit.status}, the other {other.status}"] += 1
        if kind == signal.SIGTERM:  # it kills the process if it comes before the processes have connected
            assert hit.status in (0, 128 + kind, -kind) and "Traceback" not in hit.err, hit
        reported = [line for line in other.err.splitlines() if line.startswith("error: ")]
        assert len(reported) == (other.status not in (0, 128 + signal.SIGTERM)), other
        assert "Traceback" not in other.err and "stack trace" not in other.err, other

        # No completed save is lost, and the run resumed from the newest one.
        after = steps_saved(folder)
        assert after >= before, (number, before, after)
        out = processes[0].out.read_text()
        for step in re.findall(r"resuming from step ([\d,]+) of", out):
            assert int(step.replace(",", "")) == before, (number, before, out)
        if (folder / "metrics.jsonl").exists():
            epochs = [line["epoch"] for line in comparable(folder)]
            assert epochs == list(range(len(epochs))), (number, epochs)
        print(f"{number + 1:4} {kind.name} on {victim} {moment}: {before} -> {after}", flush=True)

    for process in start(argv, tmp_path):
        assert process.end(3600).status == 0
    assert comparable(folder) == comparable(tmp_path / "undisturbed")
    assert_same(last_arrays(argv, folder), last_arrays(undisturbed, tmp_path / "undisturbed"))
    assert not list(folder.glob("damaged_*"))
    for (moment, name), count in sorted(kills.items()):
        print(f"{moment:<28} {name} {count:4}")
    for line, count in sorted(alone.items()):
        print(f"{count:4} {line}")
    print(
        f"{KILLS} kills in {(time.monotonic() - began) / 60:.1f} min; the other ended within {slowest:.0f} s"
    )
