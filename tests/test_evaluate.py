"""The commands that use a trained run: evaluate and encode."""

import functools
import gc
import json
import logging
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mocosfl_jax import (
    MomentumContrast,
    encode,
    encode_images,
    encoder_of_run,
    evaluate,
    export,
    knn_accuracy,
    load_encoder,
    mocosfl,
)
from mocosfl_jax.algorithm.interface import EVERYWHERE
from mocosfl_jax.config import Data
from mocosfl_jax.data import images as fitting
from mocosfl_jax.errors import UserError
from mocosfl_jax.evaluation import classifiers, monitor
from mocosfl_jax.evaluation.features import make_encode
from mocosfl_jax.train import main as train
from mocosfl_jax.training import checkpoint, experiment, workdir
from tests.support.small_run import CLASSES, PER_CLASS, arguments, metrics
from tests.support.toy import make_toy_model
from tests.support.training import single

PREPROCESSING = '{{"image_size": {}, "mean": {}, "std": {}}}'
KNN = ("knn_backbone", "knn_projection")


@pytest.fixture
def run(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run's workdir."""
    return shutil.copytree(finished, tmp_path / "run")


def run_evaluate(folder: pathlib.Path, *more: str) -> dict[str, float]:
    assert evaluate.main(["evaluate", f"--workdir={folder}", *more]) == 0
    return json.loads((folder / "evaluation.json").read_text())


WRITTEN = ("evaluation.json", "neighbours.png", "embedding.png")


def files(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and content of all files below the folder, but those that evaluate writes."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name not in WRITTEN]
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in paths
        if path != folder
    }


def test_the_newest_checkpoint_has_the_numbers_of_the_run(
    run: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    (run / "checkpoints" / "24.orbax-checkpoint-tmp").mkdir()  # left by a training that is saving
    before = files(run)
    found = run_evaluate(run)
    first, *_, last, probe = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    assert (found["step"], found["epoch"], found["probe_epochs"]) == (18, 3, 3)
    for name in KNN:
        assert found[name] == last[name]
    for name in ("linear_probe", "linear_probe_best_on_test", "linear_probe_raw_pixels"):
        assert found[name] == probe[name]
    assert found["knn_raw_pixels"] == first["knn_raw_pixels"]
    assert found["data_fingerprint"] == json.loads((run / "config.json").read_text())["data_fingerprint"]
    assert "other_data" not in found
    captured = capsys.readouterr()
    for line in (
        "checkpoint 18, epoch 3 of 3",
        f"kNN, untrained {first['knn_backbone']:>19.3f}{first['knn_projection']:>12.3f}",
        f"kNN, trained {last['knn_backbone']:>21.3f}{last['knn_projection']:>12.3f}",
        f"linear probe {probe['linear_probe']:>21.3f}",
    ):
        assert line in captured.out
    assert captured.err == ""
    assert files(run) == before


def test_an_earlier_checkpoint_without_probes(run: pathlib.Path) -> None:
    found = run_evaluate(run, "--checkpoint=6", "--probe_epochs=0")
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert found["step"] == line["step"] == 6
    for name in KNN:
        assert found[name] == line[name]
    assert "linear_probe" not in found


def test_other_settings_of_knn(run: pathlib.Path, images: str, capsys: pytest.CaptureFixture) -> None:
    """The untrained network was evaluated with the run's settings: its numbers do not stand beside these."""
    found = run_evaluate(run, "--probe_epochs=0", "--knn_k=2", "--knn_temperature=0.5")
    assert (found["knn_k"], found["knn_temperature"]) == (2, 0.5)
    assert "untrained" not in capsys.readouterr().out
    with np.load(images) as arrays:
        train, test = (features_by_hand(run, arrays[f"x_{split}"]) for split in ("train", "test"))
        labels = arrays["y_train"], arrays["y_test"]
    given = train, labels[0], test, labels[1]
    assert found["knn_backbone"] == knn_accuracy(*given, num_classes=CLASSES, k=2, temperature=0.5)


def test_a_run_of_real_clients_has_their_numbers_of_images(
    run: pathlib.Path, images: str, tmp_path: pathlib.Path
) -> None:
    """Its server's own data only evaluate, and may be too few for the clients that there were."""
    expected = run_evaluate(run, "--probe_epochs=0")
    workdir.write_clients(run, dict.fromkeys(range(4), 36))  # batches of 2: 18 steps an epoch
    found = run_evaluate(run, "--probe_epochs=0")
    assert (found["step"], found["epoch"]) == (18, 1)
    assert found["knn_backbone"] == expected["knn_backbone"]

    with np.load(images) as arrays:
        few = {name: array[::9] for name, array in arrays.items()}  # six images for four clients
    np.savez(tmp_path / "few.npz", **few)
    found = run_evaluate(run, "--probe_epochs=0", f"--data.dir={tmp_path / 'few.npz'}", "--accept_other_data")
    assert found["epoch"] == 3 and 0 <= found["knn_backbone"] <= 1  # as metrics.jsonl says of step 18


def test_few_labels(
    run: pathlib.Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "metrics.jsonl").unlink()
    keys = []

    def keeping(probe: Any, rng: jax.Array, *more: Any, **how: Any) -> Any:
        keys.append(jax.random.key_data(rng).tolist())
        return probe(rng, *more, **how)

    for name in ("linear_probe", "semi_supervised"):
        monkeypatch.setattr(classifiers, name, functools.partial(keeping, getattr(classifiers, name)))
    found = run_evaluate(run, "--semi_supervised", "--probe_epochs=40")
    ten, one = (f"semi_supervised_{percent}_percent" for percent in (10, 1))
    assert 0 <= found[ten] <= found[f"{ten}_best_on_test"] <= 1
    assert 0 <= found[one] <= found[f"{one}_best_on_test"] <= 1
    # Of the 12 images of a class, both fractions are one, so the draws differ by the keys alone.
    features, pixels, of_ten, of_one = keys
    assert features == pixels and features != of_ten != of_one != features
    out = capsys.readouterr().out
    assert "10 % of the labels" in out and "\n1 % of the labels" in out and "untrained" not in out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_not_moved(
    run: pathlib.Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    for file in (run / "checkpoints" / "18").rglob("*"):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(b"")
    before = files(run)
    with caplog.at_level(logging.WARNING):
        assert run_evaluate(run, "--probe_epochs=0")["step"] == 12
    assert "checkpoint 18 is damaged and skipped" in caplog.text
    assert evaluate.main(["evaluate", f"--workdir={run}", "--checkpoint=18"]) == 2
    assert "none of the checkpoints can be read: 18" in capsys.readouterr().err
    assert files(run) == before
    gc.collect()  # Orbax leaves coroutines behind when a restore fails


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--workdir is missing; allowed: --workdir=FOLDER, --config=FILE, --checkpoint=STEP"),
        (["--workdir=/nowhere"], "--workdir: found no folder /nowhere"),
        (["--workdir={tmp}"], "holds no config.json"),
        (["--workdir={run}", "--checkpoint=7"], "--checkpoint: found 7, allowed: 18, 12, 6"),
        (["--workdir={run}", "--checkpoint=7", "--data.dir=/nowhere"], "--checkpoint: found 7"),
        (["--workdir={run}", "--checkpoint=last"], "--checkpoint=last"),
        (["--workdir={run}", "--probe_epochs=-1"], "--probe_epochs=-1"),
        (["--workdir={run}", "--knn_k=0"], "--knn_k=0"),
        (["--workdir={run}", "--knn_temperature=0"], "--knn_temperature: found 0.0, allowed: more than 0"),
        (["--workdir={run}", "--probe_epochs=0", "--semi_supervised"], "--probe_epochs: found 0, allowed: 1"),
        (["--workdir={run}", "--chekpoint=6"], "found --chekpoint, did you mean --checkpoint=6?"),
        (["{run}"], "allowed: --workdir=FOLDER"),
        (["--workdir={run}", "--data_dir=x"], "found --data_dir, did you mean --data.dir=x?"),
        (["--workdir={run}", "--data.name=npz", "--data.dir=/nowhere"], "--data.dir: /nowhere"),
        (["--workdir={run}", "--data.name=cifar11"], "--data.name: 'cifar11' is none of"),
        (["--workdir={run}", "--data.max_broken=2"], "--data.max_broken=2"),
    ],
)
def test_a_mistake_is_one_line(
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    argv = [argument.format(run=finished, tmp=tmp_path) for argument in arguments]
    assert evaluate.main(["evaluate", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert not (finished / "evaluation.json").exists()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"epochs"', '"epoch"', "config.json: config: found field 'epoch', allowed: algorithm, seed"),
        ('"queue_size": 20,', "", "config.moco.queue_size: found no such field"),
        ('"epochs": 3', '"epochs": "3"', "config.epochs: found '3', allowed: int"),
        ('"epochs": 3', '"epochs": 0', "config.epochs: found 0, allowed: 1 or more"),
        ('"epochs": 3', '"epochs" 3', "config.json: not JSON"),
    ],
)
def test_a_configuration_that_does_not_fit(
    run: pathlib.Path, capsys: pytest.CaptureFixture, old: str, new: str, message: str
) -> None:
    path = run / "config.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    assert evaluate.main(["evaluate", f"--workdir={run}"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_run_that_has_not_saved_yet(run: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(run / "checkpoints")
    assert evaluate.main(["evaluate", f"--workdir={run}"]) == 2
    assert "found no checkpoint" in capsys.readouterr().err
    assert not (run / "checkpoints").exists()


@pytest.fixture
def others(tmp_path: pathlib.Path) -> pathlib.Path:
    """Dark pictures of another size, in three classes, as an npz."""
    rng = np.random.default_rng(1)
    colours = rng.integers(20, 80, (3, 1, 1, 3))
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 7), ("test", 4)):
        labels = np.repeat(np.arange(3), count)
        pictures = colours[labels] + rng.integers(-20, 20, (len(labels), 20, 20, 3))
        arrays |= {f"x_{split}": pictures.astype(np.uint8), f"y_{split}": labels}
    arrays["class_names"] = np.array(["ant", "bee", "cow"])
    np.savez(tmp_path / "dark.npz", **arrays)  # type: ignore[arg-type]
    return tmp_path / "dark.npz"


def features_by_hand(run: pathlib.Path, images: np.ndarray) -> np.ndarray:
    """Backbone features, an image at a time, normalised with the numbers of preprocessing.json."""
    model, (client, server), _ = encoder_of_run(run)
    values = json.loads((run / "preprocessing.json").read_text())
    sized = [np.asarray(fitting.fit(Image.fromarray(image), values["image_size"])) for image in images]
    rows = [(image / 255 - values["mean"]) / values["std"] for image in sized]
    encoded = jax.jit(lambda x: model.backbone(server, model.client(client, x)))
    return np.concatenate([np.asarray(encoded(row[None].astype(np.float32))) for row in rows])


def test_transfer_to_another_data_set(
    run: pathlib.Path, others: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    run_evaluate(run, "--probe_epochs=0")
    own = (run / "evaluation.json").read_bytes()
    before = files(run)
    argv = [f"--workdir={run}", "--data.name=npz", f"--data.dir={others}", "--probe_epochs=20"]
    assert evaluate.main(["evaluate", *argv]) == 0
    found = json.loads((run / "evaluation_npz_dark.json").read_text())
    for name in ("evaluation_npz_dark.json", "neighbours_npz_dark.png", "embedding_npz_dark.png"):
        (run / name).unlink()
    assert files(run) == before and (run / "evaluation.json").read_bytes() == own

    with np.load(others) as arrays:
        train, test = (features_by_hand(run, arrays[f"x_{split}"]) for split in ("train", "test"))
        expected = knn_accuracy(train, arrays["y_train"], test, arrays["y_test"], num_classes=3, k=5)
    assert found["knn_backbone"] == expected
    assert found["data"] == {"name": "npz", "dir": str(others), "image_size": 16}
    assert (found["step"], found["knn_k"], found["probe_epochs"]) == (18, 5, 20)
    assert [found["data_fingerprint"][f"{split}_images"] for split in ("training", "test")] == [21, 12]
    assert 0 <= found["linear_probe"] <= found["linear_probe_best_on_test"] <= 1
    out = capsys.readouterr().out
    assert f"checkpoint 18 on {others}" in out and "3 classes" in out and "evaluation_npz_dark.json" in out
    assert "untrained" not in out.split("3 classes")[1]


def test_the_runs_own_data_by_name_give_the_numbers_of_the_run(run: pathlib.Path, images: str) -> None:
    """Transfer to the same images takes another way, and ends in the same features."""
    own = run_evaluate(run)
    argv = [f"--workdir={run}", "--data.name=npz", f"--data.dir={images}"]
    assert evaluate.main(["evaluate", *argv]) == 0
    other = json.loads((run / "evaluation_npz_images.json").read_text())
    for name in (*KNN, "knn_raw_pixels", "linear_probe", "data_fingerprint"):
        recorded = json.loads((run / "config.json").read_text())
        assert other[name] == (own[name] if name in own else recorded[name])


def test_data_that_have_moved(run: pathlib.Path, images: str, tmp_path: pathlib.Path) -> None:
    moved = shutil.copy(images, tmp_path / "moved.npz")
    path = run / "config.json"
    path.write_text(path.read_text().replace(images, "/nowhere.npz"))
    found = run_evaluate(run, f"--data.dir={moved}", "--probe_epochs=0")
    assert found["knn_backbone"] == metrics(run)[-2]["knn_backbone"]


def test_changed_data_are_evaluated_as_other_data(
    run: pathlib.Path, others: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """With the preprocessing of the run, its epoch, and a mark; not beside numbers of the run's own data."""
    path = run / "config.json"
    record = json.loads(path.read_text())
    record["data"]["dir"] = str(others)
    path.write_text(json.dumps(record))
    argv = [f"--workdir={run}", "--checkpoint=12", "--probe_epochs=5"]
    assert evaluate.main(["evaluate", *argv]) == 2
    assert "--accept_other_data" in capsys.readouterr().err
    found = run_evaluate(run, *argv[1:], "--accept_other_data")
    out = capsys.readouterr().out
    assert (
        f"{run}: checkpoint 12, epoch 2, on other data than the run's (training images: 48 there, 21" in out
    )
    assert "untrained" not in out

    assert evaluate.main(["evaluate", *argv, "--data.name=npz", f"--data.dir={others}"]) == 0
    expected = json.loads((run / "evaluation_npz_dark.json").read_text())
    shown = [line for line in capsys.readouterr().out.splitlines() if "kNN" in line or "linear" in line]
    assert shown == [line for line in out.splitlines() if "kNN" in line or "linear" in line]
    changes: Any = found.pop("other_data")
    assert changes[0] == "training images: 48 there, 21 now"
    assert found.pop("epoch") == 2
    del expected["data"]
    assert found == expected

    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"step": 12' not in line]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert "epoch" not in run_evaluate(run, *argv[1:], "--accept_other_data")


@pytest.mark.parametrize("command", [evaluate, encode])
def test_help_names_every_flag(command: object, capsys: pytest.CaptureFixture) -> None:
    assert command.main(["command", "--help"]) == 0  # type: ignore[attr-defined]
    out = capsys.readouterr().out
    for flag in command.USAGE.split(", ")[:-1]:  # type: ignore[attr-defined]
        assert out.count(flag) >= 2, flag  # in the synopsis and in the list of flags


@pytest.fixture
def pictures(images: str, run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The training images as PNG files in folders; the data set of the run's configuration is missing."""
    folder = tmp_path / "pictures"
    with np.load(images) as arrays:
        for i, (picture, label) in enumerate(zip(arrays["x_train"], arrays["y_train"], strict=True)):
            (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"class{label}" / f"{i:03}.png")
    path = run / "config.json"
    path.write_text(path.read_text().replace(images, "/nowhere.npz"))
    return folder


def run_encode(run: pathlib.Path, folder: pathlib.Path, *more: str) -> dict[str, np.ndarray]:
    out = run.parent / "features.npz"
    argv = [f"--workdir={run}", f"--images={folder}", f"--out={out}", *more]
    assert encode.main(["encode", *argv]) == 0
    assert not list(run.parent.glob("*.tmp"))
    with np.load(out) as arrays:
        return dict(arrays)


def test_encoded_files_have_the_features_of_the_run(
    finished: pathlib.Path, run: pathlib.Path, pictures: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BATCH", 20)
    got = run_encode(run, pictures, "--checkpoint=12")
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    assert got["files"].tolist() == [f"class{label}/{i:03}.png" for i, label in enumerate(labels)]
    prepared = experiment.prepare(workdir.read_config(finished), single())
    state, _ = checkpoint.restore(finished / "checkpoints", 12, prepared.algorithm, jax.devices()[0])
    dataset = prepared.dataset
    features, _ = monitor.features(
        prepared.dataset, state, make_encode(prepared.algorithm, dataset.mean, dataset.std)
    )
    for name, expected in features._asdict().items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(run_encode(run, pictures)["backbone"], got["backbone"], rtol=1e-3)


def test_files_are_fitted_or_skipped(
    run: pathlib.Path, pictures: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "wild"
    (folder / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    wide.save(folder / "b.png")
    fitting.fit(wide, 16).save(folder / "deep" / "er" / "c.PNG")
    Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(folder / "gray.jpeg")
    (folder / "a.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not one either")
    (folder / ".hidden.png").write_bytes(b"")
    got = run_encode(run, folder)
    assert got["files"].tolist() == ["b.png", "deep/er/c.PNG", "gray.jpeg"]
    np.testing.assert_allclose(got["backbone"][0], got["backbone"][1], rtol=1e-6)
    assert got["projection"].shape == (3, 8)
    out = capsys.readouterr().out
    assert f"skipped: {folder / 'a.jpg'} (not an image of a known format)" in out
    assert "skipped: 1 of 4 files" in out
    assert "not used: 1 hidden, 1 of type .txt (named with -v)" in out and "notes.txt" not in out
    run_encode(run, folder, "-v")
    out = capsys.readouterr().out
    assert f"not used: {folder / 'notes.txt'} (of type .txt)" in out
    assert f"not used: {folder / '.hidden.png'} (hidden)" in out


def test_encode_takes_a_data_set(
    run: pathlib.Path,
    others: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(encode, "BATCH", 8)
    out = tmp_path / "features.npz"
    argv = [f"--workdir={run}", "--data.name=npz", f"--data.dir={others}", f"--out={out}"]
    assert encode.main(["encode", *argv]) == 0
    with np.load(out) as arrays, np.load(others) as given:
        got = dict(arrays)
        for split in ("train", "test"):
            np.testing.assert_array_equal(got[f"{split}_labels"], given[f"y_{split}"])
            expected = features_by_hand(run, given[f"x_{split}"])
            np.testing.assert_allclose(got[f"{split}_backbone"], expected, rtol=1e-4, atol=1e-5)
            assert got[f"{split}_projection"].shape == (len(expected), 8)
    assert got["class_names"].tolist() == ["ant", "bee", "cow"]
    assert {array.dtype.str for name, array in got.items() if "labels" in name} == {"<i4"}
    assert set(got) == {
        *(f"{split}_{name}" for split in ("train", "test") for name in ("backbone", "projection", "labels")),
        "class_names",
    }
    shown = capsys.readouterr().out
    assert "21 training and 12 test images of 3 classes" in shown and "backbone 32, projection 8" in shown


def test_features_in_three_lines(run: pathlib.Path, images: str, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "encoder.safetensors"
    assert export.main(["export", f"--workdir={run}", f"--out={file}", "--checkpoint=12"]) == 0
    with np.load(images) as arrays:
        pictures = arrays["x_test"]
    of_run = encode_images(encoder_of_run(run, checkpoint=12), pictures)
    of_file = encode_images(load_encoder(file), pictures, batch_size=5)
    for one, other in zip(of_run, of_file, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    newest = encode_images(encoder_of_run(str(run)), pictures / 255)
    np.testing.assert_allclose(newest.backbone, features_by_hand(run, pictures), rtol=1e-4, atol=1e-5)
    assert not np.allclose(newest.backbone, of_run.backbone, rtol=1e-3)
    assert newest.backbone.dtype == np.float32


def test_a_mistake_with_an_encoder_names_the_argument(run: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"^workdir: found no folder /nowhere, allowed"):
        encoder_of_run("/nowhere")
    with pytest.raises(UserError, match=r"^checkpoint: found 7, allowed: 18, 12, 6"):
        encoder_of_run(run, checkpoint=7)
    encoder = encoder_of_run(run)
    for shape in ((16, 16, 3), (2, 16, 16), (2, 16, 16, 1), (0, 16, 16, 3)):
        with pytest.raises(UserError, match=r"^images: found shape \[.*\], allowed: \[n, H, W, 3\]"):
            encode_images(encoder, np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="images: found int64"):
        encode_images(encoder, np.zeros((2, 16, 16, 3), np.int64))
    with pytest.raises(UserError, match="images: "):
        encode_images(encoder, np.full((2, 16, 16, 3), 200.0))


@pytest.mark.usefixtures("short_resnet")
@pytest.mark.parametrize("algorithm", ["mocosfl", "flmoco"])
def test_batch_norm_in_the_head_is_over_all_images(
    algorithm: str,
    images: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Neither the batches nor the rows that pad them count. One picture alone has no projection."""
    run, pictures = tmp_path / "run", tmp_path / "pictures"
    fields = {"algorithm": algorithm, "moco.head": "mlp_bn", "epochs": 1, "mesh.data": 2, "eval.knn_k": 3}
    assert train(arguments(images, run, *(f"--config.{k}={v}" for k, v in fields.items()))) == 0
    assert run_evaluate(run)["knn_projection"] == metrics(run)[-2]["knn_projection"]

    pictures.mkdir()
    with np.load(images) as arrays:
        for i, picture in enumerate(arrays["x_train"][:9]):
            Image.fromarray(picture).save(pictures / f"{i}.png")
    together = run_encode(run, pictures)
    monkeypatch.setattr(encode, "BATCH", 4)
    apart = run_encode(run, pictures)
    np.testing.assert_allclose(apart["projection"], together["projection"], rtol=1e-4, atol=1e-5)

    file = tmp_path / "encoder.safetensors"
    assert export.main(["export", f"--workdir={run}", f"--out={file}"]) == 0
    model, (client, server), _ = load_encoder(file)
    head = jax.tree.map(np.float64, server["head"])
    hidden = together["backbone"] @ head["hidden"]["kernel"] + head["hidden"]["bias"]
    unit = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    rectified = np.maximum(unit * head["norm"]["scale"] + head["norm"]["bias"], 0)
    expected = rectified @ head["out"]["kernel"] + head["out"]["bias"]
    np.testing.assert_allclose(together["projection"], expected, rtol=1e-3, atol=1e-4)
    assert np.std(expected, axis=0).min() > 0.01

    one = model.client(client, jnp.zeros((1, 16, 16, 3)))
    assert model.backbone(server, one).shape == (1, 8)
    with pytest.raises(UserError, match=r"^head: found mlp_bn and a batch of one image"):
        model.server(server, one)
    for path in sorted(pictures.iterdir())[1:]:
        path.unlink()
    capsys.readouterr()
    assert encode.main(["encode", f"--workdir={run}", f"--images={pictures}", f"--out={tmp_path}/x.npz"]) == 2
    error = capsys.readouterr().err
    assert "config.moco.head: found mlp_bn and a batch of one image" in error and error.count("\n") == 1
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images={good}", "--out={tmp}/f.npz"], "--workdir is missing"),
        (["--workdir={run}", "--out={tmp}/f.npz"], "--images is missing, or --data.name; allowed"),
        (["--workdir={run}", "--data.dir=x", "--out={tmp}/f.npz"], "--images is missing, or --data.name"),
        (
            ["--workdir={run}", "--images={good}", "--data.name=npz", "--out={tmp}/f.npz"],
            "found --images and --data.name, allowed: one of",
        ),
        (["--workdir={run}", "--data.name=npz", "--data.dir={bad}", "--out={tmp}/f.npz"], "--data.dir: "),
        (["--workdir={run}", "--images={good}"], "--out is missing"),
        (["--workdir={run}", "--images=/nowhere", "--out={tmp}/f.npz"], "--images: found no folder /nowhere"),
        (["--workdir={run}", "--images={empty}", "--out={tmp}/f.npz"], "holds no picture, allowed: .png"),
        (["--workdir={run}", "--images={bad}", "--out={tmp}/f.npz"], "none of the 1 files"),
        (["--workdir={run}", "--images={good}", "--out={tmp}/no/f.npz"], "--out: found"),
        (["--workdir={run}", "--images={good}", "--out={tmp}"], "--out: found"),
    ],
)
def test_a_mistake_of_encode_is_one_line(
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    folders = {name: tmp_path / name for name in ("good", "bad", "empty")}
    for folder in folders.values():
        folder.mkdir()
    Image.new("RGB", (16, 16)).save(folders["good"] / "x.png")
    (folders["bad"] / "x.png").write_bytes(b"")
    argv = [argument.format(run=finished, tmp=tmp_path, **folders) for argument in arguments]
    assert encode.main(["encode", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("*.npz*"))


def test_a_folder_that_takes_no_files_is_refused_before_any_work(
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(dir: pathlib.Path) -> None:  # also where the tests run as root
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    for module in (evaluate, encode, export):
        monkeypatch.setattr(module.compiler, "set_up", lambda: pytest.fail("the work has begun"))
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    out = f"--out={tmp_path}/y"
    for command, argv, message in (
        (evaluate, [], f"--workdir: found {finished}, allowed: a folder that can be written to (Read-only"),
        (encode, [f"--images={tmp_path}", out], f"--out: found {tmp_path}/y, allowed: a writable file (Read"),
        (export, [out], f"--out: found {tmp_path}/y, allowed: a writable file (Read-only file system)"),
    ):
        assert command.main(["command", f"--workdir={finished}", *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_features_that_cannot_be_written_leave_no_file(
    run: pathlib.Path,
    pictures: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", failing)
    argv = [f"--workdir={run}", f"--images={pictures}", f"--out={tmp_path / 'x.npz'}"]
    assert encode.main(["encode", *argv]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.parametrize("name, other", [("width", 8), ("cut_layer", 2)])
def test_a_configuration_of_another_network_is_refused(
    run: pathlib.Path, capsys: pytest.CaptureFixture, name: str, other: int
) -> None:
    """Arrays of other shapes are neither truncated nor padded with zeros, and none is skipped."""
    path = run / "config.json"
    values = json.loads(path.read_text())
    assert values["model"][name] != other
    values["model"][name] = other
    path.write_text(json.dumps(values))
    assert evaluate.main(["evaluate", f"--workdir={run}", "--probe_epochs=0"]) == 2
    error = capsys.readouterr().err
    assert f"{run / 'checkpoints' / '18'}: found " in error and "that of the configuration" in error
    assert error.count("\n") == 1


def test_a_checkpoint_in_another_precision_is_refused(
    run: pathlib.Path, capsys: pytest.CaptureFixture, x64: None
) -> None:
    assert evaluate.main(["evaluate", f"--workdir={run}", "--probe_epochs=0"]) == 2
    error = capsys.readouterr().err
    assert "in float32, allowed: float64; JAX_ENABLE_X64 has to be as it was" in error
    assert error.count("\n") == 1


def test_a_checkpoint_of_an_earlier_layout_is_refused(tmp_path: pathlib.Path) -> None:
    """Before the cohort left the pool, a checkpoint had every client's online model under `clients`."""
    earlier: Any = {"step": jnp.zeros((), jnp.int32), "clients": {"scales": jnp.zeros(3)}}
    algorithm = mocosfl(make_toy_model(), num_clients=1, moco=MomentumContrast(queue_size=4))._replace(
        init=lambda rng, models=None: earlier, homes=lambda state: EVERYWHERE
    )
    folder, place = tmp_path / "checkpoints", jax.devices()[0]
    with checkpoint.open_manager(folder, 1) as manager:
        checkpoint.save(manager, earlier, checkpoint.Progress(4))
    with pytest.raises(UserError, match=r"checkpoints/4: found the layout of an earlier version"):
        checkpoint.restore(folder, None, algorithm, place)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "holds no preprocessing.json"),
        ("[]", "found other fields, allowed: image_size, mean, std"),
        ("{}", "found other fields"),
        ('{"image_size": 16}', "found other fields"),
        (
            PREPROCESSING.format("16.0", "[0, 0, 0]", "[1, 1, 1]"),
            "image_size: found 16.0, allowed: 1 to 8192",
        ),
        (PREPROCESSING.format("true", "[0, 0, 0]", "[1, 1, 1]"), "image_size: found True, allowed: 1 to"),
        (PREPROCESSING.format("0", "[0, 0, 0]", "[1, 1, 1]"), "image_size: found 0, allowed: 1 to"),
        (PREPROCESSING.format("1e9", "[0, 0, 0]", "[1, 1, 1]"), "image_size: found 1000000000.0"),
        (PREPROCESSING.format("16", "[0, 0]", "[1, 1, 1]"), "mean: found [0, 0], allowed: three numbers"),
        (PREPROCESSING.format("16", "0.5", "[1, 1, 1]"), "mean: found 0.5, allowed: three numbers"),
        (PREPROCESSING.format("16", "[0, NaN, 0]", "[1, 1, 1]"), "mean: found [0, nan, 0], allowed"),
        (PREPROCESSING.format("16", '["0", 0, 0]', "[1, 1, 1]"), "mean: found ['0', 0, 0], allowed"),
        (
            PREPROCESSING.format("16", "[0, 0, 0]", "[1, 0, 1]"),
            "std: found [1, 0, 1], allowed: three numbers above",
        ),
        (PREPROCESSING.format("16", "[0, 0, 0]", "[1, -1, 1]"), "std: found [1, -1, 1], allowed: three"),
        (PREPROCESSING.format("16", "[0, 0, 0]", "null"), "std: found None, allowed: three numbers above 0"),
    ],
)
def test_a_run_without_preprocessing(
    run: pathlib.Path,
    pictures: pathlib.Path,
    capsys: pytest.CaptureFixture,
    content: str | None,
    message: str,
) -> None:
    path = run / "preprocessing.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    argv = [f"--workdir={run}", f"--images={pictures}", f"--out={run.parent / 'x.npz'}"]
    assert encode.main(["encode", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_names_in_other_letters_have_files_of_their_own() -> None:
    names = [
        evaluate.file_name(Data(name="image_folder", dir=f"/data/{name}")) for name in ("猫", "犬", "cats")
    ]
    assert len(set(names)) == 3 and all(name.isascii() for name in names)
    assert names[2] == "evaluation_image_folder_cats.json"
