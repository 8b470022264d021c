"""Clients and server killed at random, many times: training always goes on, and ends."""

import pathlib
import random
import signal
import time

import numpy as np
import pytest

from tests.support.federation import Federation, toy_fields
from tests.support.small_run import metrics

KILLS = 50
EPOCHS = 600


@pytest.mark.soak
def test_fifty_kills(tmp_path: pathlib.Path) -> None:
    rng = random.Random(0)
    federation = Federation(tmp_path, toy_fields(tmp_path, EPOCHS))
    running = {"serve": federation.serve()} | {f"join-{i}": federation.join(i) for i in range(3)}
    try:
        federation.until(lambda: federation.epochs() >= 0)
        progress = []
        for kill in range(KILLS):
            before = federation.epochs()
            federation.until_after(before, 300)
            time.sleep(rng.uniform(0, 0.5))
            victim = rng.choice(list(running))
            number = rng.choice([signal.SIGKILL, signal.SIGTERM])
            running[victim].send_signal(number)
            running[victim].wait(120)
            running[victim] = (
                federation.serve() if victim == "serve" else federation.join(int(victim.rpartition("-")[2]))
            )
            progress.append(federation.epochs())
            print(f"kill {kill + 1}: {victim} {number.name}, epoch {progress[-1]}", flush=True)
            if progress[-1] > EPOCHS - 20:
                break
        else:
            assert len(progress) == KILLS
        assert len(progress) == KILLS, "too few epochs for so many kills"
        assert running["serve"].wait(1800) == 0, federation.log("serve")
        for name, process in running.items():
            assert process.wait(60) == 0, federation.log(name)
        lines = metrics(federation.workdir)
        assert [line["epoch"] for line in lines] == [*range(EPOCHS + 1), EPOCHS]
        assert np.isfinite([line["loss"] for line in lines if "loss" in line]).all()
        for name in running:
            assert "Traceback" not in federation.log(name)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
