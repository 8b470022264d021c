"""The points of accuracy against leak: their processes, how they go on, and what is made of their results."""

import json
import pathlib
import sys
import threading
from typing import Any

import pytest
from PIL import Image

from mocosfl_jax.config import resolve
from scripts import leaks, subset
from scripts.page import marks

# In place of a command: training writes metrics, an attack writes what it sees.
STAND_IN = """
import json, pathlib, sys, time
module, folder = sys.argv[1], pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir="))[10:])
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent / "calls").open("a") as calls:
    calls.write(f"{module} {folder.name}\\n")
if "noise" in folder.name and not (folder.parent / "repaired").exists():
    sys.exit("error: out of luck")
if (folder.parent / "slow").exists():
    time.sleep(60)
seed = int(folder.name[-1])
if module == "mocosfl_jax.train":
    (folder / "config.json").write_text('{"environment": {"commit": "0123456789abcdef", "device": "cpu"}}')
    lines = [{"step": 0, "epoch": 0, "knn_backbone": 0.2, "knn_raw_pixels": 0.35}]
    lines += [{"step": 6, "epoch": 1, "knn_backbone": 0.4}]
    lines += [{"step": 6, "epoch": 1, "linear_probe": 0.5 + seed / 10, "linear_probe_raw_pixels": 0.45}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
else:
    row = {"attacker": "ridge", "ssim": 0.3, "mse_5th_percentile": 0.01}
    row |= {"smashed": "key", "relative_mse": 0.25}
    rows = [row, row | {"smashed": "query", "relative_mse": 0.5}, row | {"smashed": "", "relative_mse": 0.1}]
    epochs = next(a for a in sys.argv if a.startswith("--epochs="))[9:]
    out = pathlib.Path(next(a for a in sys.argv if a.startswith("--out="))[6:])
    out.mkdir(exist_ok=True)
    (out / "privacy.json").write_text(json.dumps({"rows": rows, "epochs": epochs}))
"""


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = leaks.steps

    def replaced(*arguments: Any) -> list[leaks.Step]:
        return [
            step._replace(command=[sys.executable, "-c", STAND_IN, *step.command[2:]])
            for step in steps(*arguments)
        ]

    monkeypatch.setattr(leaks, "steps", replaced)
    monkeypatch.setattr(subset, "cifar10", lambda directory: None)
    monkeypatch.setattr(subset, "write", lambda images, path, **which: path.touch())


def calls(folder: pathlib.Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.usefixtures("stand_in")
def test_a_point_follows_its_expert_and_what_failed_is_tried_again(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder, page = tmp_path / "runs", tmp_path / "page.md"
    page.write_text("before\n<!-- leaks -->\nNothing yet.\n<!-- end of leaks -->\nafter\n")
    argv = [
        f"--workdir={folder}",
        "--points=taressfl-4-0.3,noise-1.0",
        "--seeds=1,2",
        "--jobs=1",
        f"--page={page}",
    ]
    assert leaks.main(argv) == 1
    assert calls(folder) == [
        "mocosfl_jax.train expert-4-0.3-seed1",
        "mocosfl_jax.train taressfl-4-0.3-seed1",
        "mocosfl_jax.attack taressfl-4-0.3-seed1",
        "mocosfl_jax.train noise-1.0-seed1",
        "mocosfl_jax.train expert-4-0.3-seed2",
        "mocosfl_jax.train taressfl-4-0.3-seed2",
        "mocosfl_jax.attack taressfl-4-0.3-seed2",
        "mocosfl_jax.train noise-1.0-seed2",
    ]
    assert "noise-1.0-seed1.log: error: out of luck" in capsys.readouterr().out

    (folder / "repaired").touch()
    assert leaks.main(argv) == 0
    assert calls(folder)[8:] == [
        f"mocosfl_jax.{w} noise-1.0-seed{s}" for s in (1, 2) for w in ("train", "attack")
    ]
    assert leaks.main(argv) == 0 and len(calls(folder)) == 12
    # An attack of one's own on a run is none of the results.
    (folder / "noise-1.0-seed1" / "privacy.json").write_text("{}")
    # Other attacks repeat the attacks only; a part of the points leaves the others in the results.
    assert leaks.main([*argv, "--epochs=3", "--points=noise-1.0", "--seeds=2"]) == 0
    assert calls(folder)[12:] == ["mocosfl_jax.attack noise-1.0-seed2"]

    lines = [json.loads(line) for line in (folder / "leaks.jsonl").read_text().splitlines()]
    assert [(line["point"], line["seed"], line["attack_epochs"]) for line in lines] == [
        ("taressfl-4-0.3", 1, "6"),
        ("taressfl-4-0.3", 2, "6"),
        ("noise-1.0", 1, "6"),
        ("noise-1.0", 2, "3"),
    ]
    # The strongest attacker is that of the keys; one that needs no smashed data is none.
    assert {(line["smashed"], line["relative_mse"], line["knn_backbone"]) for line in lines} == {
        ("key", 0.25, 0.4)
    }
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "Nothing yet" not in text
    # Of 0.6 and 0.7; their standard error is half their difference.
    assert "| noise-1.0 | 0.400 ± 0.000 (2) | 0.650 ± 0.050 (2) | 0.250 ± 0.000 (2) |" in text
    assert "On raw pixels: kNN 0.350, linear probe 0.450." in text and "commits 0123456; devices cpu;" in text
    assert (folder / "source.npz").exists() and (folder / "target.npz").exists()
    with Image.open(tmp_path / "page" / "leaks.png") as picture:
        assert picture.width > 600

    # Another machine adds a seed to the page, and replaces one.
    other = tmp_path / "other"
    other.mkdir()
    (other / "repaired").touch()
    argv = [f"--workdir={other}", "--points=noise-1.0", "--seeds=2,3", f"--page={page}", "--epochs=4"]
    assert leaks.main(argv) == 0
    published = (tmp_path / "page" / "leaks.jsonl").read_text()
    assert published == (other / "leaks.jsonl").read_text()
    lines = [json.loads(line) for line in published.splitlines()]
    assert [(line["point"], line["seed"], line["attack_epochs"]) for line in lines] == [
        ("taressfl-4-0.3", 1, "6"),
        ("taressfl-4-0.3", 2, "6"),
        ("noise-1.0", 1, "6"),
        ("noise-1.0", 2, "4"),
        ("noise-1.0", 3, "4"),
    ]
    assert "| noise-1.0 | 0.400 ± 0.000 (3) |" in page.read_text()


@pytest.mark.usefixtures("stand_in")
def test_runs_are_told_to_end_when_the_time_is_over(tmp_path: pathlib.Path) -> None:
    (tmp_path / "slow").touch()
    argv = [f"--workdir={tmp_path}", "--points=open-1,open-3", "--seeds=1", "--minutes=0.05"]
    assert leaks.main(argv) == 0
    assert sorted(calls(tmp_path)) == ["mocosfl_jax.train open-1-seed1", "mocosfl_jax.train open-3-seed1"]
    (tmp_path / "slow").unlink()
    assert leaks.main(argv[:-1]) == 0
    assert len(calls(tmp_path)) == 6


def test_mistakes_are_one_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    assert leaks.main([f"--workdir={tmp_path / 'runs'}", "--points=closed"]) == 2
    assert capsys.readouterr().err.startswith("error: --points: found closed, allowed: open-1, open-3, ")
    (tmp_path / "page.md").write_text("# No marks")
    assert leaks.main([f"--workdir={tmp_path / 'runs'}", f"--page={tmp_path / 'page.md'}"]) == 2
    assert leaks.main([f"--workdir={tmp_path / 'runs'}", f"--page={tmp_path / 'none.md'}"]) == 2
    assert not (tmp_path / "runs").exists()


def test_every_configuration_is_possible() -> None:
    assert not set(leaks.SOURCE) & set(leaks.TARGET) and len({*leaks.SOURCE, *leaks.TARGET}) == 10
    module = leaks.runpy.run_path(str(leaks.CONFIGS))
    for name in module["POINTS"] | module["EXPERTS"]:
        resolve(module["get_config"](name))
    for point in module["POINTS"].values():
        if point.init_from is not None:
            assert pathlib.Path(point.init_from).name in module["EXPERTS"] and point.optim.client_lr == 0


def test_the_control_differs_from_another_point_by_the_decoder_alone() -> None:
    get_config = leaks.runpy.run_path(str(leaks.CONFIGS))["get_config"]
    control, other = get_config("expert-0"), get_config("expert-4-0.6")
    assert resolve(control).resist.strength == 0 and resolve(other).resist.strength == 4
    other.resist.strength = control.resist.strength
    assert control == other
    control, other = get_config("taressfl-0"), get_config("taressfl-4-0.6")
    assert control.init_from == "runs/leaks/expert-0"
    other.init_from = control.init_from
    assert control == other


def test_the_page_has_the_marks(tmp_path: pathlib.Path) -> None:
    page = leaks.CONFIGS.parents[1] / "docs" / "privacy.md"
    text = page.read_text()
    first, last = marks("leaks")
    before, after = text.split(first)[0], text.split(last)[1]
    copy = tmp_path / "privacy.md"
    copy.write_text(text)
    (tmp_path / "leaks.png").write_bytes(b"png")
    (tmp_path / "leaks.md").write_text("| a |\n|---|\n| 1 |\n")
    (tmp_path / "leaks.jsonl").write_text("{}\n")
    leaks.fill(copy, tmp_path)
    filled = copy.read_text()
    assert filled.startswith(before) and filled.endswith(after) and len(before) > 1000 and len(after) > 100
    assert "| 1 |" in filled and (tmp_path / "privacy" / "leaks.png").read_bytes() == b"png"
    # Once more, nothing is doubled.
    leaks.fill(copy, tmp_path)
    assert copy.read_text() == filled


def test_nothing_begins_after_the_stop(tmp_path: pathlib.Path) -> None:
    stop = threading.Event()
    stop.set()
    step = leaks.Step([sys.executable, "-c", "raise SystemExit"], tmp_path / "done", "", tmp_path / "log")
    assert leaks.follow([[step]], 1, stop) == [] and not step.log.exists()
