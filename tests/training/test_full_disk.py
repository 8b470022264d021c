"""A full disk is reported in one line, no completed save is lost, and the run can resume.

The default tests make the operating system refuse to enlarge files; the soak test fills a small disk.
"""

import contextlib
import gc
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.config import Checkpoint, Clients, Config, Data, Eval, Moco, Model, Synchronization
from mocosfl_jax.errors import DiskFullError
from mocosfl_jax.training import checkpoint, loop, saving, workdir
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.journal import Output
from tests.support.small_run import arguments
from tests.support.toy import IMAGE, make_toy_model
from tests.support.training import Metrics, comparable, prepare, train


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Within this context, the operating system lets no file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def prepared(folder: pathlib.Path, on_full_disk: str) -> Run:
    path = folder / "images.npz"
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (24, *IMAGE)).astype(np.uint8), np.arange(24) % 3
    np.savez(path, x_train=pictures, y_train=labels, x_test=pictures, y_test=labels)
    return prepare(
        Config(
            epochs=4,
            data=Data(name="npz", dir=str(path)),
            clients=Clients(num=3, batch_size=2, noniid_ratio=1.0),
            sync=Synchronization(frequency=1),
            model=Model(width=4),
            moco=Moco(key_dim=8, queue_size=20),
            eval=Eval(every=0, knn_k=3, probe_epochs=0),
            checkpoint=Checkpoint(keep=1, on_full_disk=on_full_disk),
        ),
        model=make_toy_model(),
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(prepared(folder, "stop"), folder / "run")
    return folder / "run"


def train_watched(
    run: Run, folder: pathlib.Path, watch: Callable[[Metrics], None]
) -> tuple[list[str], DiskFullError | None]:
    """Messages and the error that stops the run; `watch` gets each line of metrics before it is written."""
    reported: list[str] = []
    workdir.claim(folder, run.config, {})
    try:
        loop.train(run, lambda: False, Output(folder, reported.append, watch))
    except DiskFullError as error:
        return reported, error
    return reported, None


def last_checkpoint(run: Run, folder: pathlib.Path) -> tuple[int, list[np.ndarray]]:
    """The step of the only checkpoint in the folder, and its arrays."""
    like = jax.jit(run.algorithm.init)(jax.random.key(0))
    with checkpoint.open_manager(folder / "checkpoints", keep=1) as manager:
        assert len(manager.all_steps()) == 1
        restored = checkpoint.restore_newest(manager, like, run.algorithm.homes)
    assert restored is not None
    return restored[1].step, [np.asarray(leaf) for leaf in jax.tree.leaves(restored[0])]


def wait_for_checkpoint(folder: pathlib.Path, step: int) -> None:
    """Checkpoints are saved in the background."""
    deadline = time.monotonic() + 60
    while not (folder / "checkpoints" / str(step)).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _Usage(NamedTuple):
    free: int


def test_without_room_for_a_checkpoint_the_run_stops_and_can_resume(
    undisturbed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(tmp_path, "stop")

    def fill(metrics: Metrics) -> None:
        if metrics["epoch"] == 2:
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(1000))

    _, error = train_watched(run, tmp_path / "run", fill)
    assert "/checkpoints: no room to save step 8, 1.0 MiB are needed and 0.0 MiB free" in str(error)
    assert last_checkpoint(run, tmp_path / "run")[0] == 4
    monkeypatch.undo()
    assert train(run, tmp_path / "run")
    assert comparable(tmp_path / "run") == comparable(undisturbed)


def test_a_run_set_to_continue_saves_again_when_there_is_room(
    undisturbed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither checkpoints nor lines of metrics fit on the disk in epochs 2 and 3; in the end all exist."""
    run = prepared(tmp_path, "continue")
    path = tmp_path / "run" / "metrics.jsonl"
    with contextlib.ExitStack() as stack:

        def fill(metrics: Metrics) -> None:
            if metrics["epoch"] == 2:
                wait_for_checkpoint(tmp_path / "run", 4)
                monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(1000))
                stack.enter_context(largest_file(path.stat().st_size + 10))
            if metrics["epoch"] == 4:
                monkeypatch.undo()
                stack.close()
                assert len(comparable(tmp_path / "run")) == 2

        reported, error = train_watched(run, tmp_path / "run", fill)
    assert error is None
    going_on = [
        line
        for line in reported
        if line.endswith("training continues, and saving resumes when there is room")
    ]
    assert [line.split(": ")[1][:22] for line in going_on] == [
        "no room for 1 more lin",
        "no room to save step 8",
        "no room for 2 more lin",
        "no room to save step 1",
    ]
    assert comparable(tmp_path / "run") == comparable(undisturbed)
    ours, theirs = (last_checkpoint(run, folder) for folder in (tmp_path / "run", undisturbed))
    assert ours[0] == theirs[0] == run.total_steps
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # from Orbax
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
def test_a_disk_that_fills_up_during_a_save_leaves_the_previous_checkpoint(
    undisturbed: pathlib.Path, tmp_path: pathlib.Path, on_full_disk: str
) -> None:
    """With a single checkpoint kept, the old one is deleted only when the new one is complete."""
    run = prepared(tmp_path, on_full_disk)
    with contextlib.ExitStack() as stack:

        def fill(metrics: Metrics) -> None:
            if metrics["epoch"] == 2:
                wait_for_checkpoint(tmp_path / "run", 4)
                stack.enter_context(largest_file(2000))  # the arrays need more, the metrics less
            if metrics["epoch"] == 4:
                stack.close()

        reported, error = train_watched(run, tmp_path / "run", fill)
    gc.collect()  # coroutines that Orbax leaves behind
    full = f"{tmp_path / 'run' / 'checkpoints'}: the disk was full before a checkpoint was complete"
    left = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    if on_full_disk == "stop":
        assert str(error) == full and left == ["4"]
        assert train(run, tmp_path / "run")
    else:
        assert error is None and any(line.startswith(f"{full}; training continues") for line in reported)
        assert left == [str(run.total_steps)]
    assert comparable(tmp_path / "run") == comparable(undisturbed)
    assert last_checkpoint(run, tmp_path / "run")[0] == run.total_steps


def test_metrics_are_appended_whole_or_not_at_all(tmp_path: pathlib.Path) -> None:
    first, *others = ({"step": step, "epoch": 0} for step in range(3))
    workdir.append_metrics(tmp_path, [first])
    with largest_file(50), pytest.raises(DiskFullError, match=r"metrics\.jsonl: no room for 2 more lines"):
        workdir.append_metrics(tmp_path, others)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "epoch": 0}\n'
    workdir.append_metrics(tmp_path, others)
    assert workdir.read_metrics(tmp_path) == [first, *others]


def test_smashed_data_that_do_not_fit_are_refused_before_they_are_mapped(tmp_path: pathlib.Path) -> None:
    """A write into a mapped file on a full disk would kill the process."""
    store = saving.Store(tmp_path, jax.ShapeDtypeStruct((3, 2, 1000), "float32"))
    smashed = SmashedData(jax.numpy.ones(1000), jax.numpy.ones(1000))
    with largest_file(10_000), pytest.raises(DiskFullError, match=r"replay_1\.npy: .* GiB, File too large"):
        store.write(1, 0, smashed)
    assert not list(tmp_path.iterdir())
    store.write(1, 0, smashed)


@pytest.mark.soak
@pytest.mark.parametrize("on_full_disk", ["stop", "continue"])
@pytest.mark.parametrize("kib", [300, 700, 1000, 1300, 1600, 1900, 2200, 2500, 3000])
def test_small_disks(images: str, tmp_path: pathlib.Path, on_full_disk: str, kib: int) -> None:
    """The command on a separate disk of `kib` KiB (Linux, where users may mount one in a namespace)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = arguments(
        images,
        disk / "run",
        f"--config.checkpoint.on_full_disk={on_full_disk}",
        "--config.checkpoint.keep=2",
        "--config.eval.probe_epochs=0",
    )
    command = [sys.executable, "-m", "mocosfl_jax.train", *argv[1:]]
    script = (
        f"mount -t tmpfs -o size={kib}k none {disk} && "
        f"{{ {' '.join(command)}; echo status $?; ls {disk}/run/checkpoints; }}"
    )
    process = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300, check=True
    )
    code, *checkpoints = process.stdout.split("status ")[1].split()
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    print(kib, on_full_disk, code, checkpoints, errors, len(process.stderr.splitlines()))
    assert not any("tmp" in name for name in checkpoints)
    if code != "0":
        assert code in "12" and len(errors) == 1, process.stderr
        newest = max((int(name) for name in checkpoints), default=None)
        expected = "no checkpoint yet" if newest is None else f"checkpoints/{newest}"
        assert errors[0].endswith(expected) or "--workdir" in errors[0]
