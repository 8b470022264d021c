"""The runs of the claims: which there are, how they go on, and what is made of their results."""

import collections
import json
import math
import pathlib
import re
import sys
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.config import Config, resolve
from mocosfl_jax.training import workdir
from scripts import claims, leaks, subset
from scripts.page import marks
from tests.support import data_files

# In place of a run's command: what it does depends on its seed.
STAND_IN = """
import json, pathlib, signal, sys, time
folder, seed, knn = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
with (folder / "calls").open("a") as calls:
    calls.write("x")
if seed == 13 and not (folder.parent / "repaired").exists():
    sys.exit("error: out of luck")
if seed == 14 and not (folder / "stopped").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "stopped").touch(), sys.exit(143)))
    time.sleep(60)
environment = {"commit": "0123456789abcdef+changes", "device": "cpu"}
(folder / "config.json").write_text(json.dumps({"environment": environment}))
lines = [{"step": 0, "epoch": 0, "knn_backbone": 0.2, "knn_projection": 0.1, "knn_raw_pixels": 0.35}]
if seed == 12:
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\\n")
    sys.exit("error: the loss of step 3 is nan; no checkpoint yet")
lines += [{"step": 100, "epoch": 1, "loss": 6, "divergence": 0.5, "collapsed": 0}]
lines += [{"step": 200, "epoch": 2, "loss": 5, "divergence": 0.1, "collapsed": int(seed == 11)}]
lines[-1] |= {"knn_backbone": knn, "knn_projection": knn + 0.01}
(folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Accuracies of the runs, by name, which the test fills in."""
    accuracies: dict[str, float] = {}

    def command(
        run: claims.Run, images: pathlib.Path, folder: pathlib.Path, more: Sequence[str]
    ) -> list[str]:
        arguments = [
            str(folder),
            str(run.seed),
            str(accuracies.get(run.name, 0.4)),
            f"--config=C:{run.point}",
        ]
        return [sys.executable, "-c", STAND_IN, *arguments, *more]

    monkeypatch.setattr(claims, "command", command)
    monkeypatch.setattr(subset, "cifar10", lambda directory: None)
    monkeypatch.setattr(subset, "write", lambda images, path, **counts: path.touch())
    return accuracies


def lines(workdir: pathlib.Path) -> dict[str, claims.Line]:
    return {f"{line['point']}-seed{line['seed']}": line for line in read(workdir)}


def read(workdir: pathlib.Path) -> list[claims.Line]:
    return [json.loads(line) for line in (workdir / "runs.jsonl").read_text().splitlines()]


def points() -> dict[str, Any]:
    return {run.point: run for run in claims.runs([], [1])}


def config(point: str) -> Config:
    return claims.runpy.run_path(str(claims.CONFIGS))["get_config"](point)


def test_all_points_see_the_same_images_with_the_same_network() -> None:
    """But for the centralised MoCo and the cut layers, they differ only in what their names say."""
    found = {name: resolve(config(name)) for name in points()}
    assert len({each.total_epochs for each in found.values()}) == 1
    for name, each in found.items():
        assert each.clients.cohort * each.clients.batch_size == 100, name
        assert each.clients.cohort == each.clients.num, name
        assert each.clients.local_epochs == 1, name
    assert len({(each.model.name, each.model.width, each.moco.key_dim) for each in found.values()}) == 1
    assert (
        len({each.optim.server_lr for name, each in found.items() if not re.search("scaled|deep", name)}) == 1
    )
    for n in (5, 20, 50, 100):
        on, off = found[f"concatenation-{n}-on"].as_dict(), found[f"concatenation-{n}-off"].as_dict()
        assert on["moco"].pop("concatenate") is True and off["moco"].pop("concatenate") is False
        assert on == off
        scaled = found[f"concatenation-{n}-off-scaled"].optim
        assert scaled.server_lr == scaled.client_lr == pytest.approx(on["optim"]["server_lr"] / n)
        assert found[f"concatenation-{n}-flmoco"].algorithm == "flmoco"
    for frequency in (1, 5, 25, 100):
        plain = found[f"sync-cut6-f{frequency}"].as_dict()
        monaco = found[f"sync-cut6-f{frequency}-monaco"].as_dict()
        assert plain["sync"] == monaco["sync"] | {"momentum_models": False, "frequency": frequency}
        assert plain | {"sync": None} == monaco | {"sync": None}


def test_every_point_is_run_with_the_first_seed_before_the_next() -> None:
    runs = claims.runs([], [3, 1])
    count = len(points())
    assert [run.seed for run in runs] == [3] * count + [1] * count
    assert collections.Counter(run.claim for run in runs[:count]) == {
        "concatenation": 17,
        "sharing": 8,
        "synchronization": 20,
        "deep": 9,
    }
    some = claims.runs(["sharing", "sync-cut1-f5"], [1])
    assert {run.claim for run in some} == {"sharing", "synchronization"} and len(some) == 9


def test_an_unknown_point_is_refused_in_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    assert claims.main([f"--workdir={tmp_path}", "--claims=sync-cut1-f7"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --claims: found sync-cut1-f7, allowed: concatenation, sharing, synchron")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", [claims, leaks])
def test_two_processes_do_not_share_a_workdir(
    command: types.ModuleType, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    """Each would write the results of all runs, without those of the other."""
    with workdir.locked(tmp_path):
        assert command.main([f"--workdir={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --workdir: found another process that trains in {tmp_path}")
    with pytest.raises(SystemExit):
        command.main([f"--workdir={tmp_path}", "--jobs=0"])
    assert "--jobs: found 0, allowed: 1 or more" in capsys.readouterr().err


def test_the_next_call_does_what_is_missing(
    tmp_path: pathlib.Path, stand_in: dict[str, float], capsys: pytest.CaptureFixture
) -> None:
    """A collapse and a loss that is not finite are results, a failure is tried again, the others are not."""
    argv = [f"--workdir={tmp_path}", "--claims=sync-cut1-f5", "--seeds=10,11,12,13", "--jobs=3"]
    assert claims.main(argv) == 1
    assert "failed: sync-cut1-f5-seed13: error: out of luck" in capsys.readouterr().out
    found = lines(tmp_path)
    assert {name[-2:]: line["outcome"] for name, line in found.items()} == {
        "10": "finished",
        "11": "finished",
        "12": "not finite",
        "13": "failed",
    }
    finished = found["sync-cut1-f5-seed10"]
    assert finished["divergence"] == pytest.approx(0.3)  # the mean over epochs
    assert (finished["loss"], finished["knn_backbone"]) == (5, 0.4)
    assert finished["knn_projection"] == pytest.approx(0.41)
    assert (finished["knn_untrained"], finished["knn_raw_pixels"]) == (0.2, 0.35)
    assert (finished["collapsed"], found["sync-cut1-f5-seed11"]["collapsed"]) == (False, True)
    assert finished["commit"] == "0123456+changes" and finished["device"] == "cpu"
    assert "sync-cut1-f5" in finished["command"]
    assert "knn_backbone" not in found["sync-cut1-f5-seed12"]
    assert not (tmp_path / "sync-cut1-f5-seed10" / "checkpoints").exists()

    (tmp_path / "repaired").touch()
    assert claims.main(argv) == 0
    calls = {seed: (tmp_path / f"sync-cut1-f5-seed{seed}" / "calls").read_text() for seed in (10, 11, 12, 13)}
    assert calls == {10: "x", 11: "x", 12: "x", 13: "xx"}
    assert len(read(tmp_path)) == 4
    row = (tmp_path / "synchronization.md").read_text().splitlines()[2]
    assert row == "| 1 of 8 convolutions | 0.400 ± 0.000 (3), 1 collapsed, 1 not finite |"


def test_what_another_machine_has_finished_is_not_run_again(
    tmp_path: pathlib.Path, stand_in: dict[str, float]
) -> None:
    """Nor lost, if it failed here."""
    here, page = tmp_path / "here", tmp_path / "claims.md"
    argv = ["--claims=sync-cut1-f5", "--seeds=13"]
    assert claims.main([f"--workdir={here}", *argv]) == 1
    page.write_text("".join("".join(marks(claim)) for claim in claims.MEASURES))
    (tmp_path / "claims").mkdir()
    name = "sync-cut1-f5-seed13"
    stand_in[name] = 0.5
    (there := tmp_path / "there").mkdir()
    (there / "repaired").touch()
    assert claims.main([f"--workdir={there}", *argv]) == 0
    (tmp_path / "claims" / "runs.jsonl").write_text((there / "runs.jsonl").read_text())
    assert claims.main([f"--workdir={here}", *argv, f"--page={page}"]) == 0
    assert lines(tmp_path / "claims")[name]["knn_backbone"] == 0.5
    assert (here / name / "calls").read_text() == "x"


def test_when_the_time_is_over_runs_save_and_the_next_call_resumes_them(
    tmp_path: pathlib.Path, stand_in: dict[str, float]
) -> None:
    argv = [f"--workdir={tmp_path}", "--claims=sharing-iid-on-400", "--seeds=14,1", "--jobs=1"]
    assert claims.main([*argv, "--minutes=0.1"]) == 0
    found = lines(tmp_path)
    assert {name: line["outcome"] for name, line in found.items()} == {
        "sharing-iid-on-400-seed14": "interrupted"
    }
    assert (tmp_path / "sharing-iid-on-400-seed14" / "stopped").exists()
    seconds = found["sharing-iid-on-400-seed14"]["seconds"]
    assert seconds >= 5

    assert claims.main(argv) == 0
    found = lines(tmp_path)
    assert {line["outcome"] for line in found.values()} == {"finished"} and len(found) == 2
    assert found["sharing-iid-on-400-seed14"]["seconds"] > seconds  # of both processes


def test_tables_have_means_and_standard_errors_and_stand_on_the_page(
    tmp_path: pathlib.Path, stand_in: dict[str, float]
) -> None:
    accuracies = {1: 0.40, 2: 0.44, 3: 0.45}
    less = {1: 0.1, 2: 0.13, 3: 0.1}
    for seed, accuracy in accuracies.items():
        stand_in[f"sharing-noniid-on-400-seed{seed}"] = accuracy
        stand_in[f"sharing-noniid-off-400-seed{seed}"] = accuracy - less[seed]
        stand_in[f"sharing-noniid-off-4000-seed{seed}"] = accuracy - 0.1
    page = tmp_path / "page.md"
    parts = [f"<!-- {claim} -->\nold\n<!-- end of {claim} -->" for claim in claims.MEASURES]
    page.write_text("\n\n".join(["# Claims", *parts, "The end."]))
    names = "sharing-noniid-on-400,sharing-noniid-off-400,sharing-noniid-off-4000"
    argv = [f"--workdir={tmp_path / 'runs'}", f"--claims={names}", f"--page={page}"]
    assert claims.main(argv) == 0

    mean = sum(accuracies.values()) / 3
    error = math.sqrt(sum((a - mean) ** 2 for a in accuracies.values()) / 2 / 3)
    text = page.read_text()
    assert text.startswith("# Claims\n\n<!-- concatenation -->\nold\n") and text.endswith("\n\nThe end.")
    assert "![kNN accuracy, backbone features, over keys K of all queues together](page/sharing.png)" in text
    tables = text.partition("<!-- sharing -->")[2].partition("<!-- end of sharing -->")[0].splitlines()
    assert "old" not in tables
    assert "| kNN accuracy, backbone features | 400 | 4,000 |" in tables
    assert f"| two classes, one queue | {mean:.3f} ± {error:.3f} (3) |  |" in tables
    row = next(line for line in tables if line.startswith("| two classes, a queue for each | "))
    assert row.endswith(f" (3) | {mean - 0.1:.3f} ± {error:.3f} (3) |")
    # Of 0.1, 0.13 and 0.1: the mean is 0.33 / 3, and the standard error sqrt(0.0003) / sqrt(3).
    assert "| two classes, one queue less two classes, a queue for each | +0.110 ± 0.010 (3) |  |" in tables
    assert "kNN of backbone features before training: 0.200 to 0.200; of raw pixels: 0.350." in tables
    commands = [
        line for line in tables if line.startswith("| `--config=C:sharing-noniid-on-400` | 1, 2, 3 |")
    ]
    assert len(commands) == 1
    with Image.open(tmp_path / "page" / "sharing.png") as picture:
        assert picture.width > 600 and len(np.unique(np.asarray(picture)[..., :3].reshape(-1, 3), axis=0)) > 5

    # Another machine runs what the page does not have yet.
    other = tmp_path / "other"
    stand_in["sharing-noniid-on-400-seed4"] = 0.5
    names = "--claims=sharing-noniid-on-400"
    assert claims.main([f"--workdir={other}", names, "--seeds=1,2,3,4", f"--page={page}"]) == 0
    assert [path.name for path in other.glob("*/calls")] == ["calls"]
    published = tmp_path / "page" / "runs.jsonl"
    assert published.read_text() == (other / "runs.jsonl").read_text()
    assert len(published.read_text().splitlines()) == 10
    assert f"| two classes, one queue | {(3 * mean + 0.5) / 4:.3f} ± " in page.read_text()

    # Runs that were published without what they began from.
    lines = [json.loads(line) for line in published.read_text().splitlines()]
    for line in lines:
        del line["knn_untrained"]
    published.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert claims.main([f"--workdir={tmp_path / 'third'}", names, f"--page={page}"]) == 0
    assert "\nkNN of raw pixels: 0.350.\n" in page.read_text()

    page.write_text("# No marks")
    assert claims.main(argv) == 2
    page.unlink()
    assert claims.main(argv) == 2


def test_runs_with_other_settings_are_kept_apart(
    tmp_path: pathlib.Path, stand_in: dict[str, float], capsys: pytest.CaptureFixture
) -> None:
    argv = [f"--workdir={tmp_path / 'runs'}", "--claims=sharing-iid-on-400"]
    assert claims.main([*argv, "--seeds=1"]) == 0
    before = (tmp_path / "runs" / "runs.jsonl").read_text()
    assert claims.main([*argv, "--seeds=1,2", "--", "--config.epochs=30"]) == 2
    assert "--: found --config.epochs=30, allowed: nothing, as in the runs of" in capsys.readouterr().err
    assert (tmp_path / "runs" / "runs.jsonl").read_text() == before
    argv[0] = f"--workdir={tmp_path / 'longer'}"
    assert claims.main([*argv, "--seeds=1", "--", "--config.epochs=30"]) == 0
    assert claims.main([*argv, "--seeds=1,2"]) == 2
    assert "--: found nothing, allowed: --config.epochs=30" in capsys.readouterr().err

    page = tmp_path / "page.md"
    page.write_text("".join("".join(marks(claim)) for claim in claims.MEASURES))
    assert claims.main([*argv, f"--page={page}", "--", "--config.epochs=30"]) == 2
    assert "--: found --config.epochs=30 with --page, allowed: nothing" in capsys.readouterr().err


def test_a_run_is_trained_on_the_first_images_of_each_class(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole of it with 80 images, a narrow network and one epoch."""
    monkeypatch.setattr(claims, "PER_CLASS", 8)
    data_files.shrink("cifar10", monkeypatch)
    written = data_files.written("cifar10")
    data_files.unpack(
        tmp_path / "data" / "cifar-10-batches-bin", data_files.files("cifar10", "binary", written)
    )
    argv = [f"--data_dir={tmp_path / 'data'}", f"--workdir={tmp_path / 'runs'}", "--seeds=1"]
    more = ["epochs=1", "model.width=4", "moco.key_dim=8", "clients.batch_size=4", "eval.knn_k=5"]
    more = [f"--config.{field}" for field in more]
    assert claims.main([*argv, "--claims=concatenation-5-off", "--", *more]) == 0
    line = lines(tmp_path / "runs")["concatenation-5-off-seed1"]
    assert line["outcome"] == "finished" and 0 <= line["knn_backbone"] <= 1 and line["loss"] > 0
    assert "--config.epochs=1" in line["command"]

    with np.load(tmp_path / "runs" / "cifar10.npz") as images:
        first = [np.flatnonzero(written["y_train"] == label)[:8] for label in range(10)]
        rows = np.sort(np.concatenate(first))
        np.testing.assert_array_equal(images["x_train"], written["x_train"][rows])
        np.testing.assert_array_equal(images["y_train"], written["y_train"][rows])
        np.testing.assert_array_equal(images["x_test"], written["x_test"])
        assert images["class_names"][3] == "class3"
