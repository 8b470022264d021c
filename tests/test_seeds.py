"""launch/seeds.sh: a run for each seed, one at a time on each GPU."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "launch" / "seeds.sh"

# In place of Python: writes what it was called with, and fails for seed 13.
PYTHON = """#!/usr/bin/env bash
if [ "$2" = mocosfl_jax.table ]; then
  printf '%s\\n' "$@" >"$CALLS/table"
  exit 0
fi
for argument; do case $argument in --config.seed=*) seed=${argument#*=} ;; esac; done
gpu=$CUDA_VISIBLE_DEVICES
mkdir "$CALLS/busy_$gpu" || touch "$CALLS/two_at_a_time"
printf '%s\\n' "$gpu" "$@" >"$CALLS/seed_$seed"
sleep 0.2
rmdir "$CALLS/busy_$gpu"
echo "out of luck"
[ "$seed" != 13 ]
"""


@pytest.fixture
def calls(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The folder in which the stand-in for Python writes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / "calls").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "calls"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs GNU xargs")


def test_every_seed_runs_on_a_gpu_of_its_own(calls: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "my runs"
    more = ["--config=a b.py:20", "--config.data.dir=$HOME", "--tensorboard"]
    ended = run("3", str(folder), "1", "2", "3", "4", "5", "--", *more)
    assert (ended.returncode, ended.stderr) == (0, "")
    gpus = set()
    for seed in range(1, 6):
        gpu, *argv = (calls / f"seed_{seed}").read_text().splitlines()
        gpus.add(gpu)
        own = [f"--config.seed={seed}", f"--workdir={folder}/seed_{seed}"]
        assert argv == ["-m", "mocosfl_jax.train", *more, *own]
        assert (folder / f"seed_{seed}.log").read_text() == "out of luck\n"
    assert gpus == {"0", "1", "2"}
    assert not (calls / "two_at_a_time").exists()
    table = (calls / "table").read_text().splitlines()
    assert table == ["-m", "mocosfl_jax.table", str(folder), f"--out={folder}/table.md"]


def test_one_that_fails_is_named_and_the_others_run(calls: pathlib.Path, tmp_path: pathlib.Path) -> None:
    ended = run("1", str(tmp_path / "runs"), "13", "14")
    assert ended.returncode not in (0, 2)
    assert ended.stderr == "seed 13: status 1: out of luck\n"
    assert (calls / "seed_14").exists() and (calls / "table").exists()


def test_only_the_gpus_that_are_visible(
    calls: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab")
    assert run("2", str(tmp_path / "runs"), "1", "2", "3").returncode == 0
    gpus = {(calls / f"seed_{seed}").read_text().splitlines()[0] for seed in (1, 2, 3)}
    assert gpus == {"4", "GPU-ab"}
    ended = run("3", str(tmp_path / "runs"), "1")
    assert ended.returncode == 2 and "GPUS: found 3, allowed: at most 2" in ended.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "found 0 arguments"),
        (["two", "runs", "1"], "GPUS: found 'two', allowed: a number, 1 or more"),
        (["0", "runs", "1"], "GPUS: found '0'"),
        (["2", "runs", "--", "--config.epochs=1"], "SEED is missing"),
        (
            ["2", "runs", "1", "--config.epochs=1"],
            "SEED: found '--config.epochs=1', allowed: numbers",
        ),
        (["2", "runs", "-1"], "SEED: found '-1'"),
    ],
)
def test_a_mistake_is_one_line(calls: pathlib.Path, arguments: list[str], message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2 and not list(calls.iterdir())
    assert ended.stderr.startswith(f"error: {message}") and ended.stderr.count("\n") == 1
