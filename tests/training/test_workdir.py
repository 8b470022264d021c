"""A workdir belongs to one run on one data set, in any location; an untrained run may be replaced."""

import dataclasses
import json
import pathlib
import re
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import evaluate
from mocosfl_jax import report as report_command
from mocosfl_jax import table as table_command
from mocosfl_jax import train as train_command
from mocosfl_jax.config import resolve
from mocosfl_jax.errors import UserError
from mocosfl_jax.train import main
from mocosfl_jax.training import experiment, workdir
from tests.support import toy_config
from tests.support.small_run import arguments, metrics, write_images
from tests.support.toy import IMAGE, with_toy
from tests.support.training import single


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(write_images(tmp_path / "images.npz", IMAGE))


@pytest.fixture
def run(data: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The workdir of a finished run of the toy network on `data`."""
    assert train(data, tmp_path / "run") == 0
    return tmp_path / "run"


def train(data: pathlib.Path, folder: pathlib.Path, *more: str) -> int:
    return main(with_toy(arguments(str(data), folder, *more)))


def exchange(data: pathlib.Path, images: int) -> None:
    """Replace the data set by another one with this many training images."""
    rng = np.random.default_rng(9)
    labels = np.arange(images) % 4
    pictures = rng.integers(100, 256, (images, *IMAGE)).astype(np.uint8)
    np.savez(data, x_train=pictures, y_train=labels, x_test=pictures[:12], y_test=labels[:12])


@pytest.mark.parametrize("images", [24, 48, 90])
def test_a_run_does_not_resume_with_other_data(
    data: pathlib.Path, run: pathlib.Path, capsys: pytest.CaptureFixture, images: int
) -> None:
    kept = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    exchange(data, images)
    assert train(data, run) == 2
    error = capsys.readouterr().err
    assert "config.data: found other data than those of the run" in error and error.count("\n") == 1
    assert (f"training images: 48 there, {images} now" in error) == (images != 48)
    assert evaluate.main(with_toy(["evaluate", f"--workdir={run}"])) == 2
    assert "other pixels" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == kept


def test_other_data_are_accepted_on_request(
    data: pathlib.Path, run: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    preprocessing, lines = (run / "preprocessing.json").read_bytes(), metrics(run)
    exchange(data, 90)
    assert train(data, run, "--accept_other_data") == 0
    assert (run / "preprocessing.json").read_bytes() == preprocessing
    assert metrics(run)[: len(lines) - 1] == lines[:-1]  # each epoch is kept, exactly once
    assert evaluate.main(with_toy(["evaluate", f"--workdir={run}", "--accept_other_data"])) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["knn_backbone"] == metrics(run)[-2]["knn_backbone"]
    capsys.readouterr()
    exchange(data, 24)  # 3 epochs of 3 steps, while the checkpoint is at step 18
    assert train(data, run, "--accept_other_data") == 2
    error = capsys.readouterr().err
    assert "found a checkpoint of step" in error and error.count("\n") == 1


def test_a_run_that_goes_on_keeps_its_mean_and_standard_deviation(
    data: pathlib.Path, run: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Also on other data, in its views and in its evaluation. A run that never trained leaves none behind."""
    before = workdir.read_preprocessing(run)
    exchange(data, 90)
    config, mesh = workdir.read_config(run, toy_config.get_config().own), single()
    for prepared in (
        experiment.of_workdir(config, mesh, run, accept_other_data=True),
        experiment.prepare(config, mesh, preprocessing=workdir.preprocessing_of_trained(run)),
    ):
        assert (prepared.dataset.mean, prepared.dataset.std) == before[1:]
        views = prepared.make_views(jax.random.key(0), jnp.zeros((1, 2, *IMAGE), jnp.uint8))
        black = -np.array(before.mean) / before.std  # all views of a black picture
        np.testing.assert_allclose(views.query, np.broadcast_to(black, (1, 2, *IMAGE)), rtol=1e-5)
    new = experiment.prepare(config, mesh).dataset
    assert new.mean == pytest.approx(np.load(data)["x_train"].mean((0, 1, 2)) / 255)

    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    assert workdir.preprocessing_of_trained(run) is None
    assert workdir.preprocessing_of_trained(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "field, value, recorded", [("knn_k", 2, 5), ("knn_temperature", 0.5, 0.1), ("probe_epochs", 7, 3)]
)
def test_a_run_keeps_the_settings_of_its_results(
    field: str,
    value: Any,
    recorded: float,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """They would be other settings than those by which its numbers were computed."""
    run = tmp_path / "run"
    config = resolve(train_command.parse(with_toy(arguments(str(data), run))).config)
    assert getattr(config.eval, field) == recorded
    workdir.claim(run, config, {})
    before = (run / "config.json").read_bytes()
    other = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **{field: value}))
    # The accuracies of the untrained network are computed again.
    workdir.append_metrics(run, [{"step": 0, "epoch": 0, "knn_backbone": 0.2}])
    assert workdir.claim(run, other, {}).emptied == (field != "probe_epochs")
    assert bool(workdir.read_metrics(run)) == (field == "probe_epochs")
    workdir.claim(run, config, {})

    (run / "checkpoints" / "18").mkdir(parents=True)
    workdir.append_metrics(run, [{"step": 6, "epoch": 1, "loss": 2.0}])
    workdir.claim(run, other, {})  # there are no results yet
    assert json.loads((run / "config.json").read_text())["eval"][field] == value
    workdir.claim(run, config, {})
    assert (run / "config.json").read_bytes() == before

    line = {"step": 12, "epoch": 2, "knn_backbone": 0.4}
    workdir.append_metrics(run, [line, line | {"linear_probe": 0.6}] if field == "probe_epochs" else [line])
    message = (
        rf"config.eval.{field}: found {value}, allowed: {recorded}, as the run in .* mocosfl_jax.evaluate"
    )
    with pytest.raises(UserError, match=message):
        workdir.claim(run, other, {})
    assert (run / "config.json").read_bytes() == before
    often = dataclasses.replace(config, eval=dataclasses.replace(config.eval, every=7))
    workdir.claim(run, often, {})


def test_a_run_without_a_probe_may_get_one(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    argv = with_toy(arguments(str(data), tmp_path / "run"))
    assert main([*argv, "--config.eval.probe_epochs=0"]) == 0
    assert "linear_probe" not in metrics(tmp_path / "run")[-1]
    assert main(argv) == 0
    assert "linear_probe" in metrics(tmp_path / "run")[-1]
    assert main([*argv, "--config.eval.probe_epochs=0"]) == 2


def test_the_same_data_may_be_elsewhere(
    data: pathlib.Path, run: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = metrics(run)
    moved = tmp_path / "elsewhere.npz"
    shutil.move(data, moved)
    monkeypatch.chdir(tmp_path)
    # Its data are gone from their place.
    assert evaluate.main(with_toy(["evaluate", f"--workdir={run}"])) == 2
    for place in (moved, pathlib.Path("elsewhere.npz")):
        assert train(place, run) == 0
    assert metrics(run) == before
    assert evaluate.main(with_toy(["evaluate", f"--workdir={run}", f"--data.dir={moved}"])) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["knn_backbone"] == before[-2]["knn_backbone"]


def test_a_run_that_never_trained_is_replaced(
    data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """The loss is not finite in the first step, so only the untrained network was saved."""
    folder = tmp_path / "run"
    assert train(data, folder, "--config.optim.server_lr=1e38", "--config.optim.client_lr=1e38") == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["0"]
    capsys.readouterr()
    assert train(data, folder) == 0
    assert "held a run of which no step was trained" in capsys.readouterr().out
    assert [line["epoch"] for line in metrics(folder)] == [0, 1, 2, 3, 3]
    assert json.loads((folder / "config.json").read_text())["optim"]["server_lr"] == 0.03


def test_a_run_from_before_data_were_recorded_is_compared_by_its_folder(
    data: pathlib.Path, run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    record = json.loads((run / "config.json").read_text())
    del record["data_fingerprint"]
    (run / "config.json").write_text(json.dumps(record))
    assert train(data, run) == 0
    shutil.move(data, tmp_path / "elsewhere.npz")
    assert train(tmp_path / "elsewhere.npz", run) == 2
    assert "config.data.dir: " in capsys.readouterr().err


@pytest.mark.parametrize("record", [{}, {"model_type": "bert", "epochs": 3}, {"config": {}}])
def test_a_folder_of_another_program_stays_as_it_is(
    record: dict[str, Any], data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "other"
    (folder / "checkpoints" / "0").mkdir(parents=True)
    for name, text in (("config.json", json.dumps(record)), ("curves.png", "x"), ("checkpoints/0/x", "x")):
        (folder / name).write_text(text)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train(data, folder) == 2
    assert "config.json: found no configuration of a run; give another --workdir" in capsys.readouterr().err
    assert {
        path: path.read_bytes() for path in folder.rglob("*") if path.name != ".lock" and path.is_file()
    } == kept


def test_a_run_without_its_checkpoints_keeps_its_metrics(
    data: pathlib.Path, run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    before = (run / "metrics.jsonl").read_bytes()
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    assert train(data, run) == 2
    error = capsys.readouterr().err
    assert re.search(r"metrics.jsonl: found 4 lines of a run, but .*checkpoints has no checkpoint", error)
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(run / "checkpoints")
    (tmp_path / "elsewhere").rename(run / "checkpoints")
    assert train(data, run) == 0
    assert (run / "metrics.jsonl").read_bytes() == before


DAMAGED_LINES = [b"\xff\n", b"[1]\n", b"null\n", b'{"step": "x", "epoch": 1}\n', b"[" * 100_000 + b"\n"]
DAMAGED_LINES += [b'{"step": 1, "epoch": 1, "knn_backbone": "high"}\n']


@pytest.mark.parametrize("line", DAMAGED_LINES)
@pytest.mark.parametrize("command", [report_command, table_command, train_command])
def test_damaged_metrics_are_named_in_one_line(
    line: bytes,
    command: types.ModuleType,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = tmp_path / "run"
    argv = with_toy(arguments(str(data), folder))
    workdir.claim(folder, resolve(train_command.parse(argv).config), {})
    (folder / "metrics.jsonl").write_bytes(line)
    argvs = {table_command: ["table", str(folder)]}
    argvs |= {report_command: ["report", f"--workdir={folder}", f"--out={tmp_path / 'page.html'}"]}
    assert command.main(argvs.get(command, argv)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "metrics.jsonl: found " in error


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl"])
def test_a_file_that_cannot_be_read_is_one_line(
    file: str, data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    argv = with_toy(arguments(str(data), folder))
    workdir.claim(folder, resolve(train_command.parse(argv).config), {})
    (folder / file).unlink(missing_ok=True)
    (folder / file).mkdir()
    assert train_command.main(argv) == 2
    error = capsys.readouterr().err
    assert f"{file}: cannot be read (Is a directory)" in error and error.count("\n") == 1


def test_runs_of_real_and_of_simulated_clients_do_not_continue_each_other(
    data: pathlib.Path, run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    config = workdir.read_config(run, toy_config.get_config().own)
    with pytest.raises(UserError, match=r"holds a run of simulated clients, of mocosfl_jax\.train; give"):
        workdir.claim(run, config, {}, real_clients=True)
    workdir.write_clients(run, dict.fromkeys(range(4), 12))
    workdir.claim(run, config, {}, real_clients=True)
    capsys.readouterr()
    assert train(data, run) == 2
    error = capsys.readouterr().err
    assert (
        "holds a run of real clients, of mocosfl_jax.serve; give another" in error and error.count("\n") == 1
    )

    untrained = tmp_path / "untrained"
    workdir.claim(untrained, config, {}, real_clients=True)
    workdir.write_clients(untrained, dict.fromkeys(range(4), 12))
    assert workdir.claim(untrained, config, {}, real_clients=True) == ([], False)
    assert workdir.claim(untrained, config, {}) == ([], True)
    assert not (untrained / "clients.json").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"0": 20}', "found other clients, allowed: 0 to 3"),
        ('["0", "1", "2", "3"]', "found other clients"),
        ('{"0": 20, "1": 20, "2": 20, "3": 1}', "found 1 images of client 3, allowed: 2 to 1,000,000"),
        ('{"0": 20, "1": 20.5, "2": 20, "3": 20}', "found 20.5 images of client 1"),
        ('{"0": 1000001, "1": 20, "2": 20, "3": 20}', "found 1000001 images of client 0"),
    ],
)
def test_the_numbers_of_images_of_real_clients_are_checked(
    run: pathlib.Path, capsys: pytest.CaptureFixture, text: str, message: str
) -> None:
    (run / "clients.json").write_text(text)
    assert evaluate.main(with_toy(["evaluate", f"--workdir={run}"])) == 2
    error = capsys.readouterr().err
    assert f"clients.json: {message}" in error and error.count("\n") == 1


def test_other_data_of_another_size_are_resized(data: pathlib.Path, run: pathlib.Path) -> None:
    """Otherwise the network would be another one than preprocessing.json says."""
    rng = np.random.default_rng(3)
    pictures, labels = rng.integers(0, 256, (48, 32, 32, 3)).astype(np.uint8), np.arange(48) % 4
    np.savez(data, x_train=pictures, y_train=labels, x_test=pictures[:12], y_test=labels[:12])
    config, mesh = workdir.read_config(run, toy_config.get_config().own), single()
    assert experiment.load(config, mesh).dataset.x_train.shape[1:] == (32, 32, 3)
    known = workdir.preprocessing_of_trained(run)
    assert known is not None and known.image_size == IMAGE[0] != 32
    assert experiment.load(config, mesh, known).dataset.x_train.shape[1:] == IMAGE


def test_data_that_cannot_be_divided_any_more_are_named_as_changed(
    data: pathlib.Path, run: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    exchange(data, 4)  # of four clients with batches of two
    assert evaluate.main(with_toy(["evaluate", f"--workdir={run}"])) == 2
    error = capsys.readouterr().err
    assert "config.data: found other data than those of the run" in error and error.count("\n") == 1
