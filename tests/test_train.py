"""The command from a user's view: files, output, mistakes, kills, signals and damaged checkpoints."""

import gc
import json
import logging
import pathlib
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from PIL import Image

from mocosfl_jax import export
from mocosfl_jax.errors import UserError
from mocosfl_jax.runtime import hosts
from mocosfl_jax.runtime.environment import environment
from mocosfl_jax.train import main, parse, tensorboard_writer
from mocosfl_jax.training import checkpoint, experiment, loop
from mocosfl_jax.training.workdir import locked
from tests.support.small_run import CLASSES, PER_CLASS, arguments, metrics
from tests.support.toy import last_arrays, with_toy
from tests.support.training import prepare


def final_state(argv: list[str]) -> list[np.ndarray]:
    config, workdir, *_ = parse(argv)
    run = prepare(config)
    like = jax.jit(run.algorithm.init)(jax.random.key(0))
    with checkpoint.open_manager(workdir / "checkpoints", keep=3) as manager:
        restored = checkpoint.restore_newest(manager, like, run.algorithm.homes)
    assert restored is not None and restored[1].step == run.total_steps
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored[0])]


def assert_same_run(argv: list[str], workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """Compare metrics and the last state, bit for bit."""
    assert metrics(workdir) == metrics(reference)
    swap = [f"--workdir={reference}" if a.startswith("--workdir") else a for a in argv]
    for ours, theirs in zip(final_state(argv), final_state(swap), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def assert_same_toy_run(argv: list[str], workdir: pathlib.Path, reference: pathlib.Path) -> None:
    assert metrics(workdir) == metrics(reference)
    for ours, theirs in zip(last_arrays(argv, workdir), last_arrays(argv, reference), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_leaves_what_is_promised(finished: pathlib.Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first, *epochs, last = lines
    assert (first["step"], first["epoch"]) == (0, 0)
    assert {"knn_projection", "knn_backbone", "knn_raw_pixels"} <= set(first)
    assert first["knn_raw_pixels"] == 1.0  # the colours alone identify the classes
    steps = PER_CLASS * CLASSES // (4 * 2)
    assert [(line["step"], line["epoch"]) for line in epochs] == [(steps * e, e) for e in (1, 2, 3)]
    for line in epochs:
        assert {"loss", "top1", "images_per_s", "knn_projection", "knn_backbone"} <= set(line)
        assert line["loss"] > 0 and 0 <= line["top1"] <= 1 and line["images_per_s"] > 0
    assert 0 <= last["linear_probe"] <= last["linear_probe_best_on_test"] <= 1
    config = json.loads((finished / "config.json").read_text())
    assert config["clients"]["num"] == config["clients"]["cohort"] == 4
    assert config["seed"] == 1234
    assert config["environment"] == environment(jax.devices()[0], {"data": 1, "model": 1})
    assert config["environment"]["jax"] == jax.__version__
    for name in ("curves.png", "partition.png", "neighbours.png", "embedding.png"):
        with Image.open(finished / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
    assert len(list((finished / "checkpoints").iterdir())) == 3


def test_the_same_command_again_shows_the_result_and_changes_nothing(
    images: str, finished: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert main(arguments(images, finished)) == 0
    out = capsys.readouterr().out
    assert "linear probe" in out and "raw pixels" in out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_other_versions_are_reported_and_other_ways_to_run_are_not(
    images: str, finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    config["environment"] |= {"jax": "0.9.9", "commit": None, "x64": "True"}
    config["environment"].pop("device")
    (workdir / "config.json").write_text(json.dumps(config))
    fields = ("data.resident=False", "checkpoint.on_full_disk=continue", "checkpoint.keep=2", "mesh.data=2")
    indifferent = [f"--config.{field}" for field in fields]
    assert main(arguments(images, workdir, *indifferent)) == 0
    reported, *_ = capsys.readouterr().out.splitlines()
    now = environment(jax.devices()[0], {"data": 2, "model": 1})
    assert reported == (
        f"{workdir}: the run started in another environment, so results may not be those of "
        "an undisturbed run: "
        f"jax 0.9.9 at the start, {now['jax']} now; commit unknown at the start, {now['commit']} now; "
        f"device unknown at the start, {now['device']} now; "
        "devices data 1 x model 1 at the start, data 2 x model 1 now; x64 True at the start, False now"
    )
    config["data"]["resident"], config["mesh"]["data"] = False, 2
    config["checkpoint"] |= {"on_full_disk": "continue", "keep": 2}
    assert json.loads((workdir / "config.json").read_text()) == config


def test_another_configuration_is_refused(
    images: str, finished: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments(images, finished, "--config.epochs=4", "--config.optim.server_lr=0.5")) == 2
    error = capsys.readouterr().err
    assert "config.epochs: 3 there, 4 now; config.optim.server_lr: 0.03 there, 0.5 now" in error
    assert error.count("\n") == 1


def start(argv: list[str], *program: str) -> subprocess.Popen[str]:
    """Start a Python program, or the command with the toy network."""
    command = [sys.executable, *(program or ["-m", "tests.support.toy_command"]), *argv[1:]]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=pathlib.Path(__file__).parents[1],
    )


def wait_for_lines(workdir: pathlib.Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    path = workdir / "metrics.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Long enough that a kill comes before the end.
LONG = ("--config.epochs=40", "--config.eval.every=8", "--config.checkpoint.every=2")


@pytest.fixture(scope="module")
def undisturbed(toy_images: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    process = start(arguments(toy_images, workdir, *LONG))
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    return workdir


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(
    toy_images: str, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    argv = arguments(toy_images, tmp_path, *LONG)
    # Before the first checkpoint, and two later moments; the soak test kills at random moments.
    for lines, seconds in ((1, 0.02), (6, 0.08), (17, 0.05)):
        process = start(argv)
        wait_for_lines(tmp_path, lines, process)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
    process = start(argv)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert "resuming from step" in output
    assert_same_toy_run(argv, tmp_path, undisturbed)


def test_the_same_seed_gives_the_same_bits_in_another_process(images: str, tmp_path: pathlib.Path) -> None:
    commands = [arguments(images, tmp_path / name) for name in ("one", "other")]
    for process in [start(argv, "-m", "mocosfl_jax.train") for argv in commands]:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    assert_same_run(commands[0], tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(
    toy_images: str, undisturbed: pathlib.Path, tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    argv = arguments(toy_images, tmp_path, *LONG)
    process = start(argv)
    wait_for_lines(tmp_path, 4, process)
    process.send_signal(number)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 128 + number
    assert "Traceback" not in output
    assert re.search(r"saved at step \d+ of 240", output)
    last = output.strip().splitlines()[-1]
    command = shlex.join(with_toy(argv)[1:])
    assert last == f"stopped by {number.name}; to resume: python -m mocosfl_jax.train {command}"
    process = start(argv)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    assert_same_toy_run(argv, tmp_path, undisturbed)


@pytest.fixture
def restore_may_fail() -> Iterator[None]:
    """Orbax leaves coroutines behind when a restore fails; collect them in the test that caused them."""
    yield
    gc.collect()


orbax_leaves_coroutines = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@orbax_leaves_coroutines
@pytest.mark.usefixtures("restore_may_fail")
@pytest.mark.parametrize("damage", ["truncate", "delete", "flip"])
def test_a_damaged_newest_checkpoint_is_skipped(
    images: str, finished: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    argv = arguments(images, tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda p: int(p.name))
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "delete":
        largest.unlink()
    elif damage == "truncate":
        largest.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x40
        largest.write_bytes(content)
    (tmp_path / f"damaged_checkpoint_{newest.name}" / "of an earlier time").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert main(argv) == 0
    assert f"checkpoint {newest.name} is damaged and skipped" in caplog.text
    assert any((tmp_path / f"damaged_checkpoint_{newest.name}_2").iterdir())
    assert_same_run(argv, tmp_path, finished)


@orbax_leaves_coroutines
@pytest.mark.usefixtures("restore_may_fail")
def test_nothing_readable_is_not_silently_started_anew(
    images: str, finished: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    argv = arguments(images, tmp_path)
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(b"")
    kept = (tmp_path / "metrics.jsonl").read_bytes()
    assert main(argv) == 2
    assert "none of the checkpoints can be read: 18, 12, 6" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == kept


def test_a_second_run_in_the_same_folder_is_refused(
    images: str, finished: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    with locked(finished):
        assert main(arguments(images, finished)) == 2
    error = capsys.readouterr().err
    assert f"found another process that trains in {finished}" in error and error.count("\n") == 1
    assert main(arguments(images, finished)) == 0


def test_a_mistake_that_one_of_several_processes_meets_in_training_ends_it_at_once(
    images: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A normal exit would wait for the other processes, which wait for this one."""
    left: list[int] = []

    def train(run: experiment.Run, *rest: object) -> bool:
        raise UserError("one.png: found 3x3 pixels")

    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(hosts, "leave", left.append)
    assert main(arguments(images, tmp_path)) == 2
    assert left == [2] and capsys.readouterr().err == "error: one.png: found 3x3 pixels\n"


def test_a_loss_that_is_no_number_stops_the_run(
    toy_images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    argv = arguments(toy_images, tmp_path, "--config.optim.server_lr=1e38", "--config.optim.client_lr=1e38")
    assert main(with_toy(argv)) == 1
    error = capsys.readouterr().err
    assert re.search(r"error: .* step \d+ .*; the last good checkpoint is .*checkpoints/0", error)
    assert error.count("\n") == 1
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            "--config.epoch=3",
            "config: found field 'epoch' (did you mean --config.epochs=3?), allowed",
        ),
        (
            "--config.clients.size=3",
            "(did you mean --config.clients.batch_size=3?), allowed: num, cohort",
        ),
        ("--config.epochs.x=3", "config.epochs: found field 'x', allowed: no field below it"),
        ("--config.epochs=many", "config.epochs: found 'many', allowed: int"),
        ("--config.clients.noniid_ratio=x", "config.clients.noniid_ratio: found 'x', allowed: float"),
        ("--config.clients.cohort=x", "config.clients.cohort: found 'x', allowed: int or None"),
        ("--config=nowhere.py", "--config: found no file nowhere.py"),
        ("--epochs=3", "found --epochs, did you mean --config.epochs=3?"),
        ("loose", "found 'loose', allowed: --config=FILE"),
        ("--config.model.cut_layer=9", "config.model.cut_layer: found 9, allowed: 0 to 8 for resnet18"),
        ("--config.model.name=vgg", "config.model.name: found 'vgg', allowed: resnet18"),
        ("--config.moco.queue_size=3", "config.moco.queue_size: found 3, allowed: 16 or more"),
        ("--config.clients.cohort=5", "config.clients.cohort: found 5, allowed: 1 to 4"),
        ("--config.clients.batch_size=13", "config.moco.queue_size: found 20, allowed: 104 or more"),
        ("--config.data.dir=/nowhere.npz", "/nowhere.npz"),
        ("--config.data.name=cifar11", "cifar11"),
        ("--workdir=/dev/null/x", "--workdir"),
        ("--config.epochs=None", "config.epochs: found None, allowed: int"),
        ("--flagfile=/nowhere", "/nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, wrong: str, message: str
) -> None:
    assert main(arguments(images, tmp_path / "run", wrong)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_optional_field_can_be_unset() -> None:
    path = pathlib.Path(__file__).parents[1] / "configs" / "cifar10_cross_silo.py:20"
    assert parse(["train", f"--config={path}"])[0].clients.cohort == 5
    for unset in (["--config.clients.cohort=None"], ["--config.clients.cohort", "None"]):
        assert parse(["train", f"--config={path}", *unset])[0].clients.cohort is None


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("metrics.jsonl", "{}", "holds metrics.jsonl but no config.json"),
        ("config.json", "[]", "found no configuration"),
        ("config.json", "{", "not JSON"),
    ],
)
def test_a_folder_with_other_things_is_left_alone(
    images: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    name: str,
    content: str,
    message: str,
) -> None:
    (tmp_path / name).write_text(content)
    assert main(arguments(images, tmp_path)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (tmp_path / name).read_text() == content


def test_images_that_are_not_square_need_a_size(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    labels = np.repeat(np.arange(4), 12)
    pictures = np.zeros((48, 16, 20, 3), np.uint8)
    np.savez(tmp_path / "wide.npz", x_train=pictures, y_train=labels, x_test=pictures, y_test=labels)
    assert main(arguments(str(tmp_path / "wide.npz"), tmp_path / "run")) == 2
    assert "config.data.image_size: found None and images of 16x20" in capsys.readouterr().err


def test_a_batch_above_the_data_of_a_client_is_one_line(
    images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    wrong = ("--config.clients.batch_size=13", "--config.moco.queue_size=200")
    assert main(arguments(images, tmp_path / "run", *wrong)) == 2
    error = capsys.readouterr().err
    assert "config.clients.batch_size" in error and "13" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("def get_config(): return 3", "get_config() returned int, allowed: a Config"),
        (
            "from mocosfl_jax.config import Config, resolve\ndef get_config(): return resolve(Config())",
            "get_config() returned Resolved, allowed: a Config",
        ),
        ("x = 1", "KeyError: 'get_config'"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        (
            "from mocosfl_jax.config import Clients\ndef get_config(): return Clients(size=3)",
            "TypeError: Clients.__init__() got an unexpected keyword argument 'size'",
        ),
    ],
)
def test_a_config_file_that_does_not_work_is_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, content: str, message: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)
    assert main(["train", f"--config={path}"]) == 2
    error = capsys.readouterr().err
    assert message in error and "mine.py" in error and error.count("\n") == 1


def test_tensorboard_is_an_extra(
    images: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(arguments(images, tmp_path, "--tensorboard")) == 2
    assert "pip install 'mocosfl-jax[tensorboard]'" in capsys.readouterr().err


def test_tensorboard_gets_every_metric(tmp_path: pathlib.Path) -> None:
    with tensorboard_writer(tmp_path, True) as write:
        write({"step": 6, "epoch": 1, "loss": 2.5, "knn_backbone": 0.75})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"loss" in content and b"knn_backbone" in content and struct.pack("<f", 0.75) in content


def test_tensorboard_gets_a_finished_run(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Which has no further line."""
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    with tensorboard_writer(tmp_path, True):
        pass
    assert {step for _, step, _ in scalars(tmp_path)} == {line["step"] for line in metrics(tmp_path)}


def scalars(folder: pathlib.Path) -> list[tuple[str, int, float]]:
    """All scalars in the event files, as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            content = content[16 + length :]
    return found


def test_tensorboard_has_every_step_once_after_a_kill(images: str, tmp_path: pathlib.Path) -> None:
    assert main(arguments(images, tmp_path, "--tensorboard")) == 0
    once = scalars(tmp_path)
    lines = metrics(tmp_path)
    assert {(tag, step) for tag, step, _ in once} >= {(tag, line["step"]) for line in lines for tag in line}
    assert len({(tag, step) for tag, step, _ in once if tag == "loss"}) == 3
    shutil.rmtree(tmp_path / "checkpoints" / "18")  # as if killed just before the last save
    assert main(arguments(images, tmp_path, "--tensorboard")) == 0
    again = scalars(tmp_path)
    assert [each for each in again if each[0] != "images_per_s"] == [
        each for each in once if each[0] != "images_per_s"
    ]


def test_a_config_file_imports_its_neighbours(tmp_path: pathlib.Path) -> None:
    for folder, epochs in (("a", 7), ("b", 8)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "neighbour.py").write_text(f"EPOCHS = {epochs}\n")
        (tmp_path / folder / "mine.py").write_text(
            "from mocosfl_jax.config import Config\n"
            "import neighbour\n"
            "def get_config():\n"
            "    import neighbour as again\n"
            "    assert again is neighbour\n"
            "    return Config(epochs=neighbour.EPOCHS)\n"
        )
        before = list(sys.path)
        assert parse(["train", f"--config={tmp_path / folder / 'mine.py'}"])[0].epochs == epochs
        assert sys.path == before and "neighbour" not in sys.modules


def test_workdir_is_named_after_the_config_file() -> None:
    assert parse(["train"])[1] == pathlib.Path("runs/quickstart")
    path = pathlib.Path(__file__).parents[1] / "configs" / "cifar10_smoke.py"
    config, workdir, *_ = parse(["train", f"--config={path}", "--config.epochs=1"])
    assert (workdir, config.epochs, config.data.name) == (pathlib.Path("runs/cifar10_smoke"), 1, "cifar10")


@pytest.mark.parametrize(
    "options, shown",
    [
        (
            # Rich clients, a queue per client, and all shortcuts and averages together.
            [
                *("clients.rich=0.25", "clients.rich_data=0.5", "clients.rich_batch=2"),
                *("clients.noniid_ratio=1.0", "moco.feature_sharing=False", "moco.queue_size=64"),
                *("model.name=resnet18", "model.bottleneck=C4S2", "model.client_residual=False"),
                *("sync.weighted=True", "sync.momentum_models=True", "sync.divergence_lambda=1.0"),
                *("optim.client_lr=0.01", "optim.client_schedule=official_per_step"),
            ],
            ["1 rich", "batch 2 to 4", "bottleneck C4S2", "4 queues of 16 keys", "MonAcoSFL"],
        ),
        (
            ["optim.client_lr=0", "moco.preset=v1", "clients.cohort=3"],
            ["frozen", "0 B down", "a client takes part in 0.75 epochs on average, for config.epochs 1;"],
        ),
        (["algorithm=flmoco", "clients.local_epochs=2"], ["FL-MoCo", "whole resnet18"]),
        (["moco.concatenate=False"], ["queue of 20 keys; a step for each client, one after another"]),
        (
            ["clients.num=1", "clients.batch_size=6", "clients.noniid_ratio=1.0", "model.cut_layer=0"],
            ["up to cut layer 0: 0 parameters", "and 0 B down per step"],
        ),
    ],
    ids=["heterogeneous", "frozen", "flmoco", "without concatenation", "centralised"],
)
def test_kinds_of_run(
    images: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    short_resnet: None,
    options: list[str],
    shown: list[str],
) -> None:
    """Each run trains to its end, resumes from its files alone, and reports what it is."""
    argv = arguments(images, tmp_path, *(f"--config.{option}" for option in options), "--config.epochs=1")
    assert main(argv) == 0
    out = capsys.readouterr().out
    for words in shown:
        assert words in out
    assert all(np.isfinite(value) for line in metrics(tmp_path) for value in line.values())
    assert export.main(["export", f"--workdir={tmp_path}", f"--out={tmp_path / 'encoder.safetensors'}"]) == 0
    assert main(argv) == 0
