"""Two processes on one machine share a run: its results, its files, and which failures it survives."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest
import yaml

from mocosfl_jax.commandline import parse
from mocosfl_jax.config import Config, Mesh
from mocosfl_jax.errors import UserError
from mocosfl_jax.feed import batches
from mocosfl_jax.parallel.mesh import make_mesh
from mocosfl_jax.runtime import hosts, stderr_filter
from mocosfl_jax.train import main
from mocosfl_jax.training import checkpoint, experiment, journal, workdir
from tests.support.processes import (
    EPOCHS,
    ROOT,
    arguments,
    assert_same,
    ends,
    errors,
    free_port,
    newest,
    start,
)
from tests.support.toy import last_arrays, make_toy_model, with_toy
from tests.support.training import comparable, prepare

FATAL = "Terminating process because the JAX distributed service detected fatal errors."
LOST = "error: lost"


def wait_for_epoch(folder: pathlib.Path, epoch: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(comparable(folder)) <= epoch:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def train_here(argv: list[str], stop_after: int | None = None) -> None:
    """Run the command in this process alone, on two of its devices, optionally until the end of an epoch."""
    with pytest.MonkeyPatch.context() as patch:
        if stop_after is not None:
            patch.setattr(journal, "record", stopping(stop_after))
        assert main(with_toy(argv)) == (0 if stop_after is None else 128 + signal.SIGTERM)


def stopping(epoch: int) -> Callable[..., checkpoint.Progress]:
    """`journal.record`, with a SIGTERM at the end of the epoch."""
    record = journal.record

    def stopping(
        run: experiment.Run, progress: checkpoint.Progress, metrics: workdir.Metrics, output: journal.Output
    ) -> checkpoint.Progress:
        if metrics["epoch"] == epoch:
            signal.raise_signal(signal.SIGTERM)
        return record(run, progress, metrics, output)

    return stopping


@pytest.fixture(scope="module")
def undisturbed(two_process_images: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a single-process run on a mesh of the same shape."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(arguments(two_process_images, folder))
    return folder


def test_two_processes_stopped_killed_and_moved_equal_one_process(
    two_process_images: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Bit for bit: on a mesh of the same shape the program is the same, and a sum of two has one order."""
    folder = tmp_path / "run"
    argv = arguments(two_process_images, folder)

    # SIGTERM to one process: both save the same step and end.
    processes = start(argv, tmp_path)
    wait_for_epoch(folder, 1)
    processes[1].running.terminate()
    reporting, silent = ends(processes)
    assert reporting.status == silent.status == 128 + signal.SIGTERM, (reporting, silent)
    (saved,) = re.findall(r"saved at step (\d+) of", reporting.out)
    assert newest(folder) == int(saved) and "stopped by SIGTERM; to resume: " in reporting.out

    # One process restores what two have saved, and vice versa.
    train_here(argv, stop_after=len(comparable(folder)))
    saved_by_one = newest(folder)

    # SIGKILL to one process: the other ends by itself and reports it in one line.
    processes = start(argv, tmp_path)
    wait_for_epoch(folder, len(comparable(folder)))
    processes[1].running.kill()
    survivor, _ = ends(processes)
    assert f"resuming from step {saved_by_one}" in survivor.out
    assert survivor.status and len(errors(survivor)) == 1, survivor
    assert re.fullmatch(rf"error: {hosts.LOST}( \(.*\))?; {hosts.AGAIN}", errors(survivor)[0]), survivor
    assert "Traceback" not in survivor.err and "stack trace" not in survivor.err

    # One process moves the damaged checkpoint away, and both resume from the previous one.
    damaged = newest(folder)
    files = [path for path in (folder / "checkpoints" / str(damaged)).rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0x40
    largest.write_bytes(content)

    # None of this affects the result; only process 0 reported progress.
    reporting, silent = ends(start(argv, tmp_path))
    assert reporting.status == silent.status == 0, (reporting, silent)
    assert comparable(folder) == comparable(undisturbed)
    assert_same(last_arrays(argv, folder), last_arrays(argv, undisturbed))
    assert re.search(r"devices +2 x .* in 2 processes, mesh of data 2 x model 1\n", reporting.out)
    assert "each process loads those of its own clients" in reporting.out and "linear probe" in reporting.out
    assert f"checkpoint {damaged} is damaged and skipped" in reporting.err
    assert (folder / f"damaged_checkpoint_{damaged}").is_dir()
    assert not [line for line in silent.out.splitlines() if not line.startswith("[Gloo]")]
    assert silent.err.startswith("process 1 of 2: process 0 reports the progress\n")
    assert "damaged" not in silent.err

    # Each process has loaded images of its own clients, one half of the cohort, and no others.
    config: Config = parse(argv[:-1], "").config
    run = prepare(config, model=make_toy_model())
    dealt = np.concatenate([run.indices(epoch) for epoch in range(EPOCHS)])
    for process, members in enumerate((slice(2), slice(2, 4))):
        loaded = {int(row) for row in (tmp_path / f"rows_{process}").read_text().split()}
        assert len(loaded) > 10 and loaded <= set(dealt[:, members].ravel().tolist())


def test_two_processes_draw_the_side_that_init_from_does_not_give(
    two_process_images: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    short = ["--config.epochs=1", "--config.eval.every=0", "--config.eval.probe_epochs=0"]
    short += ["--config.mesh.data=1", "--config.mesh.model=2"]  # shards the models of the server
    source = tmp_path / "source"
    train_here(arguments(two_process_images, source, *short))
    short += ["--config.seed=5", f"--config.init_from={source}", "--config.init_parts=client"]
    alone = arguments(two_process_images, tmp_path / "alone", *short)
    train_here(alone)
    both = arguments(two_process_images, tmp_path / "both", *short)
    reporting, silent = ends(start(both, tmp_path))
    assert reporting.status == silent.status == 0, (reporting, silent)
    assert_same(last_arrays(both, tmp_path / "both"), last_arrays(alone, tmp_path / "alone"))


@pytest.mark.parametrize(
    "process, on_full_disk",
    [
        (1, "continue"),
        pytest.param(0, "stop", marks=pytest.mark.slow),
        pytest.param(1, "stop", marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_found_by_one_process_applies_to_both(
    two_process_images: pathlib.Path,
    undisturbed: pathlib.Path,
    tmp_path: pathlib.Path,
    process: int,
    on_full_disk: str,
) -> None:
    """Both stop with the previous checkpoint or continue; the one that can write does not wait forever."""
    folder = tmp_path / "run"
    argv = arguments(two_process_images, folder, f"--config.checkpoint.on_full_disk={on_full_disk}")
    reporting, silent = ends(
        start(argv, tmp_path, TOY_FULL_DISK=f"{process} 18 31")
    )  # at steps 18, 24 and 30
    full = f"{folder}/checkpoints: the disk was full before a checkpoint was complete"
    if on_full_disk == "stop":
        assert reporting.status == silent.status == 1, (reporting, silent)
        assert errors(reporting) == [f"error: {full}; the last good checkpoint is {folder}/checkpoints/12"]
        assert not errors(silent)
        assert "Traceback" not in reporting.err + silent.err, (reporting, silent)
        assert newest(folder) == 12
        assert [end.status for end in ends(start(argv, tmp_path))] == [0, 0]
    else:
        assert reporting.status == silent.status == 0, (reporting, silent)
        assert (
            reporting.out.count(f"{full}; training continues, and saving resumes when there is room\n") == 3
        )
    assert not list((folder / "checkpoints").glob("*tmp*"))
    assert comparable(folder) == comparable(undisturbed)
    assert_same(last_arrays(argv, folder), last_arrays(argv, undisturbed))


def test_a_mistake_found_by_process_0_ends_all_processes(
    two_process_images: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    reporting, silent = ends(start(arguments(two_process_images, tmp_path / "run"), tmp_path))
    assert (reporting.status, silent.status) == (2, 2)
    assert len(errors(reporting)) == 1 and "holds metrics.jsonl but no config.json" in reporting.err
    assert silent.err == "process 1 of 2: process 0 reports the progress\n"


@pytest.mark.parametrize(
    "given, message",
    [
        (["--coordinator=host:1"], "--num_processes and --process_id: found none, allowed: all three of"),
        (["--num_processes=2", "--process_id=0"], "--coordinator: found none, allowed: all three of"),
        (
            ["--coordinator=host", "--num_processes=2", "--process_id=0"],
            "--coordinator: found 'host', allowed:",
        ),
        (["--coordinator=host:0", "--num_processes=2", "--process_id=0"], "--coordinator: found 'host:0'"),
        (
            ["--coordinator=h:1", "--num_processes=0", "--process_id=0"],
            "--num_processes: found 0, allowed: 1",
        ),
        (["--num_processes=2"], "--coordinator and --process_id: found none, allowed: all three of"),
        (
            ["--coordinator=h:1", "--num_processes=2", "--process_id=2"],
            "--process_id: found 2, allowed: 0 to 1",
        ),
    ],
)
def test_wrong_arguments_are_one_line(given: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", *given]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_one_process_needs_no_address() -> None:
    where = hosts.address(None, 1, None)
    hosts.join(where)
    assert where is not None and where.num_processes == 1
    assert not jax.distributed.is_initialized() and not hosts.several()


@pytest.mark.parametrize(
    "written, passed",
    [
        (["F1125 00:00:00.1 7 client.h:80] " + FATAL, "*** Check failure", "E1125 more"], [LOST]),
        (["error: disk", "F1125 00:00:00.1 7 client.h:80] " + FATAL, "    @ 0x7f3f"], ["error: disk"]),
        (
            [
                "E1125 00:00:00.1 7 coordination_service.cc:1549] x",
                "1",
                "W1125 00:00:00.1 7 other.cc:1] y",
                "z",
            ],
            ["W1125 00:00:00.1 7 other.cc:1] y", "z"],
        ),
        (
            ["I1125 00:00:00.1 7 preemption_sync_manager.cc:3] x", "F1125 00:00:00.1 7 other.cc:1] y", "z"],
            ["F1125 00:00:00.1 7 other.cc:1] y", "z"],
        ),
        (["[Gloo] Rank 0", "", "E1125 00:00:00.1 7 other.cc:1] y"], 3 * [None]),
    ],
)
def test_cpp_output_about_a_lost_process_is_one_line(written: list[str], passed: list[str | None]) -> None:
    """Messages on other topics are passed on, also after one about the coordination service."""
    command = [sys.executable, "-c", stderr_filter.FILTER, f"{LOST}\n", "no meeting\n"]
    text = "".join(f"{line}\n" for line in written)
    ended = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    expected = [
        line if line is not None else reporting for line, reporting in zip(passed, written, strict=False)
    ]
    assert ended.stderr.splitlines() == expected


def test_a_lost_process_is_distinguished_from_a_file_with_a_similar_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosts, "several", lambda: True)
    gone = jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed by peer\nmore")
    assert hosts.is_lost(gone) and hosts.is_lost(TimeoutError("waiting for async_write_complete barrier"))
    assert hosts.lost(gone).startswith(f"{hosts.LOST} (Gloo all-reduce failed: Connection closed by peer); ")
    assert not hosts.is_lost(FileNotFoundError(2, "No such file or directory", "nccl_test/barrier.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_without_peers_reports_it_in_one_line(
    process: int, two_process_images: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """It waits for the 10 seconds set in toy_command.py, plus what XLA adds."""
    both = start(arguments(two_process_images, tmp_path / "run"), tmp_path)
    both[1 - process].running.kill()
    alone = both[process].end()
    assert alone.status and errors(alone) == ["error: the processes of the run did not connect within 10 s"]
    assert len(alone.err.splitlines()) == 1


@pytest.mark.parametrize("several", [True, False])
def test_a_cluster_is_used_if_it_started_several_processes(
    several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM's variables as srun sets them; without SLURM there are none, and no distributed runtime."""
    assert hosts._detected_processes() == 1
    slurm = {
        "JOB_ID": 7,
        "STEP_NODELIST": "node[1-2]",
        "NTASKS": 2 if several else 1,
        "PROCID": 0,
        "LOCALID": 0,
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert hosts._detected_processes() == slurm["NTASKS"]
    if not several:
        hosts.join(None)
    assert not jax.distributed.is_initialized() and not hosts.several()


def test_settings_unsupported_with_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "several", lambda: True)
    with pytest.raises(UserError, match=r"config\.mesh: found data 4 and model 1, allowed: a product of 8"):
        make_mesh(Mesh(data=4, model=1), jax.devices())
    with pytest.raises(UserError, match=r"^resident: found True, allowed: False or None"):
        batches.residence(True, 1, None)
    assert batches.residence(None, 1, None) == (
        False,
        "each process loads those of its own clients",
    )


@pytest.mark.parametrize(
    "name, command",
    [("one_node.sh", "train"), ("slurm.sh", "train"), ("tpu_pod.sh", "train"), ("clients.sh", "serve")],
)
def test_launch_scripts_are_valid_shell(name: str, command: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "launch" / name)], check=True)
    assert f"python -m mocosfl_jax.{command}" in (ROOT / "launch" / name).read_text()


def test_launch_of_gke_is_valid_yaml() -> None:
    documents = list(yaml.safe_load_all((ROOT / "launch" / "gke.yaml").read_text()))
    kinds = [document["kind"] for document in documents]
    assert kinds == ["Service", "Job"]
    job = documents[1]["spec"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] > 1
    # Kubernetes allows a policy on failures with this restart policy only.
    assert "podFailurePolicy" in job and job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["template"]["spec"]["subdomain"] == documents[0]["metadata"]["name"]


@pytest.mark.slow
def test_two_processes_train_the_quickstart_network(tmp_path: pathlib.Path) -> None:
    """Against one process on one device. Kernels and the order of sums differ, hence up to rounding."""
    fields = {
        "epochs": 1,
        "clients.num": 4,
        "clients.batch_size": 2,
        "sync.frequency": 200,
        "eval.every": 0,
        "eval.probe_epochs": 0,
    }
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        argv = [sys.executable, "-m", "mocosfl_jax.train", f"--workdir={folder}"]
        argv += [f"--config.{name}={value}" for name, value in fields.items()]
        port = free_port()
        started = [
            subprocess.Popen(
                [
                    *argv,
                    f"--coordinator=127.0.0.1:{port}",
                    f"--num_processes={processes}",
                    f"--process_id={i}",
                ],
                env=env,
            )
            for i in range(processes)
        ]
        assert [process.wait(1200) for process in started] == [0] * processes
        losses.append(workdir.read_metrics(folder)[-1]["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
