"""The table of runs: which runs are one row, and what its numbers are."""

import csv
import json
import operator
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import scipy.stats

from mocosfl_jax import table
from mocosfl_jax.config import quickstart, resolve
from mocosfl_jax.training.comparison import MEASURES

DATA = {"training_images": 60, "pixels": "ab"}


def write_run(
    folder: pathlib.Path, *, epochs: int = 3, done: int | None = None, data: Any = DATA, **fields: Any
) -> dict[str, float]:
    """Write the files of a run of `epochs` epochs, of which some are done, and return its last numbers.

    Args:
      folder: the workdir.
      epochs: of the run.
      done: of these; None: all, and the linear probe.
      data: the fingerprint.
      fields: of the configuration, with __ for a dot.
    """
    config = quickstart()
    config.epochs = epochs
    for name, value in fields.items():
        *parents, last = name.split("__")
        node = operator.attrgetter(".".join(parents))(config) if parents else config
        setattr(node, last, value)
    folder.mkdir(parents=True)
    record = resolve(config).as_dict() | {"environment": {"python": folder.name}, "data_fingerprint": data}
    (folder / "config.json").write_text(json.dumps(record))
    rng = np.random.default_rng(list(str(folder).encode()))
    lines = [{"step": 0, "epoch": 0, "knn_backbone": 0.1, "knn_projection": 0.1, "knn_raw_pixels": 0.5}]
    for epoch in range(1, (epochs if done is None else done) + 1):
        line = {"step": 6 * epoch, "epoch": epoch, "loss": float(rng.uniform(5, 9))}
        if epoch in (done, epochs):
            line |= {name: float(rng.uniform()) for name in ("knn_backbone", "knn_projection")}
        lines.append(line)
    if done is None:
        lines.append({"step": 6 * epochs, "epoch": epochs, "linear_probe": float(rng.uniform())})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: value for line in lines for name, value in line.items() if name in MEASURES}


def make(tmp_path: pathlib.Path, *arguments: str) -> list[dict[str, str]]:
    """Run the command and read its CSV."""
    out = tmp_path / "out.csv"
    assert table.main(["table", *arguments, f"--out={out}"]) == 0
    with out.open() as file:
        return list(csv.DictReader(file))


def test_means_and_standard_errors_over_seeds(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    runs = tmp_path / "runs"
    numbers = {}
    for clients in (20, 50):
        for seed in range(3 if clients == 20 else 1):
            name = f"{clients}_{seed}"
            numbers[name] = write_run(
                runs / name, clients__num=clients, moco__head="mlp" if clients == 20 else "linear", seed=seed
            )
    found = make(tmp_path, str(runs))
    assert [list(row)[: list(row).index("seeds")] for row in found] == 2 * [
        ["clients.num", "clients.cohort", "clients.batch_size", "moco.head"]
    ]
    several, single = found
    assert (several["clients.num"], several["moco.head"], several["seeds"]) == ("20", "mlp", "3")
    assert (single["clients.num"], single["moco.head"], single["seeds"]) == ("50", "linear", "1")
    for name in MEASURES:
        values = [numbers[f"20_{seed}"][name] for seed in range(3)]
        assert float(several[name]) == pytest.approx(np.mean(values), rel=1e-12)
        assert float(several[f"{name}_standard_error"]) == pytest.approx(scipy.stats.sem(values), rel=1e-12)
        assert float(single[name]) == numbers["50_0"][name] and single[f"{name}_standard_error"] == ""

    assert table.main(["table", str(runs), f"--out={tmp_path / 'out.md'}"]) == 0
    written = (tmp_path / "out.md").read_text()
    lines = written.splitlines()
    assert written.rstrip("\n") in capsys.readouterr().out
    header, dashes, first, second = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines()
    )
    assert header[4:] == ["seeds", "kNN backbone", "kNN projection", "linear probe", "loss"]
    assert all(re.fullmatch("-+", cell) for cell in dashes)
    losses = [numbers[f"20_{seed}"]["loss"] for seed in range(3)]
    assert first[-1] == f"{np.mean(losses):.3f} ± {scipy.stats.sem(losses):.3f}"
    assert second[-1] == f"{numbers['50_0']['loss']:.3f}"
    assert len({len(line) for line in lines}) == 1  # the columns are aligned


def test_runs_that_differ_in_nothing_that_counts_are_one_row(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path / "runs" / "a", seed=1)
    changes: list[dict[str, Any]] = [
        {"data__resident": False},
        {"data__max_broken": 0.1},
        {"data": DATA | {"sampled_pixels": "cd"}},  # earlier versions did not record it
        {"data__dir": "elsewhere"},  # the same data, by their fingerprint
        {"mesh__data": 4, "mesh__model": 2},
        {"checkpoint__every": 7, "checkpoint__keep": 1},
        {"eval__every": 5},
        {"clients__seed": 3},
    ]
    for number, change in enumerate(changes):
        write_run(tmp_path / "runs" / f"b{number}", seed=2 + number, **change)
    (row,) = make(tmp_path, str(tmp_path / "runs"))
    assert row["seeds"] == "9" and next(iter(row)) == "seeds"


@pytest.mark.parametrize(
    "change, column",
    [
        ({"epochs": 4}, "epochs"),
        ({"eval__knn_k": 5}, "eval.knn_k"),
        ({"eval__probe_epochs": 5}, "eval.probe_epochs"),
        ({"optim__server_lr": 0.02}, "optim.server_lr"),
        ({"data__name": "npz", "data": {"pixels": "cd"}}, "data.name"),
        ({"data": {"pixels": "cd"}}, "data_fingerprint"),
        ({"data": None}, "data_fingerprint"),
    ],
)
def test_runs_that_differ_are_two_rows(tmp_path: pathlib.Path, change: dict[str, Any], column: str) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", **change)
    rows = make(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"))
    assert len(rows) == 2 and column in list(rows[0])[: list(rows[0]).index("seeds")]
    assert rows[0][column] != rows[1][column]
    if column == "data.name":
        assert "data_fingerprint" not in rows[0]


def test_a_field_that_came_later_does_not_make_another_row(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path / "now", seed=1)
    write_run(tmp_path / "then", seed=2)
    path = tmp_path / "then" / "config.json"
    record = json.loads(path.read_text())
    assert record["model"].pop("init") == "xavier"
    path.write_text(json.dumps(record))
    (row,) = make(tmp_path, str(tmp_path / "now"), str(tmp_path / "then"))
    assert row["seeds"] == "2"


def test_unfinished_runs(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    runs = tmp_path / "runs"
    whole = write_run(runs / "whole", seed=1)
    half = write_run(runs / "half", seed=2, done=2)
    write_run(runs / "unprobed", seed=3, done=3)
    write_run(runs / "begun", seed=4, done=0)
    (runs / "begun" / "metrics.jsonl").unlink()
    (runs / "notes").mkdir()
    (row,) = make(tmp_path, str(runs))
    out = capsys.readouterr().out
    assert "unfinished, left out: 3 of 4 runs: " in out
    assert f"{runs / 'half'} (epoch 2 of 3)" in out and f"{runs / 'begun'} (epoch 0 of 3)" in out
    assert row["seeds"] == "1" and float(row["loss"]) == whole["loss"]
    (row,) = make(tmp_path, str(runs / "whole"), str(runs / "half"), "--unfinished")
    assert "unfinished, counted with their newest numbers: 1 of 2" in capsys.readouterr().out
    assert row["seeds"] == "2"
    assert float(row["knn_backbone"]) == pytest.approx((whole["knn_backbone"] + half["knn_backbone"]) / 2)
    assert float(row["linear_probe"]) == whole["linear_probe"]  # the other has none yet
    assert table.main(["table", str(runs / "half")]) == 2
    assert capsys.readouterr().err.startswith("error: found no finished run; --unfinished counts")


def test_a_run_without_a_probe_is_finished(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path / "run", done=3, eval__probe_epochs=0)
    (row,) = make(tmp_path, str(tmp_path / "run"))
    assert row["linear_probe"] == "" and float(row["knn_backbone"]) > 0


def test_the_same_run_counts_once(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    first = write_run(tmp_path / "a", seed=1)
    write_run(tmp_path / "b", seed=1)
    (row,) = make(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "a"))
    assert row["seeds"] == "1" and float(row["loss"]) == first["loss"]
    out = capsys.readouterr().out
    assert f"counted once: {tmp_path / 'b'} has the configuration and the seed of {tmp_path / 'a'}" in out
    assert out.count("counted once") == 1
    write_run(tmp_path / "c", seed=1, clients__seed=2)  # another partition, so another run
    (row,) = make(tmp_path, str(tmp_path / "a"), str(tmp_path / "c"))
    assert row["seeds"] == "2"


def test_a_run_of_the_train_command(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (row,) = make(tmp_path, str(finished))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert float(row["linear_probe"]) == lines[-1]["linear_probe"]
    for name in ("knn_backbone", "knn_projection", "loss"):
        assert float(row[name]) == lines[-2][name]


@pytest.mark.parametrize("recorded, mean", [("NaN", "nan"), ("Infinity", "inf"), ("-Infinity", "-inf")])
def test_numbers_that_are_not_finite_are_shown(
    recorded: str, mean: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    for seed in (1, 2):
        write_run(tmp_path / "runs" / str(seed), seed=seed)
    path = tmp_path / "runs" / "1" / "metrics.jsonl"
    path.write_text(re.sub(r'"linear_probe": [0-9.e-]+', f'"linear_probe": {recorded}', path.read_text()))
    (row,) = make(tmp_path, str(tmp_path / "runs"))
    assert (row["seeds"], row["linear_probe"], row["linear_probe_standard_error"]) == ("2", mean, "nan")
    assert np.isfinite(float(row["loss_standard_error"]))
    assert f" {mean} ± nan " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "RUN is missing; allowed: RUN, --out=FILE.csv"),
        (["/nowhere"], "found no run in /nowhere, allowed: the folder of a run, or of several"),
        (["{above}"], "found no run in {above}, allowed"),
        (
            ["{runs}/run", "--out={runs}/x.txt"],
            "--out: found {runs}/x.txt, allowed: a file that ends in .csv",
        ),
        (
            ["{runs}/run", "--out={runs}/no/x.md"],
            "--out: found {runs}/no/x.md, allowed: a file in an existing",
        ),
        (["{runs}/run", "--out=/proc/x.md"], "--out: found /proc/x.md, allowed: a writable file (No such"),
        (["{runs}/run", "--unfinishd"], "found --unfinishd, did you mean --unfinished?"),
        (["gs://bucket/run"], "RUN: found 'gs://bucket/run', allowed: a path"),
        (["{runs}/garbled"], "{runs}/garbled/config.json: not JSON"),
        (["{runs}/list"], "{runs}/list/config.json: found no configuration of a run"),
        (["{runs}/other"], "{runs}/other/config.json: found no configuration of a run"),
        (["{runs}/line"], "{runs}/line/metrics.jsonl: found line 1 without step and epoch"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    runs = tmp_path / "below" / "runs"
    for name in ("run", "garbled", "list", "other", "line"):
        write_run(runs / name)
    (runs / "garbled" / "config.json").write_text("{")
    (runs / "list" / "config.json").write_text("[]")
    (runs / "other" / "config.json").write_text('{"epochs": "three"}')
    (runs / "line" / "metrics.jsonl").write_text("[3]\n")
    places = {"runs": runs, "above": tmp_path}
    assert table.main(["table", *(argument.format(**places) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(**places)}") and error.count("\n") == 1
    assert not list(tmp_path.rglob("x.*"))


def test_of_two_runs_with_one_seed_the_one_that_got_furthest_counts(tmp_path: pathlib.Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs / "a_half", done=1)
    numbers = write_run(runs / "b_whole")
    write_run(runs / "c_untrained", done=0, seed=7)
    (row,) = make(tmp_path, str(runs), "--unfinished")
    # The accuracy of an untrained network is none of the run: two seeds, one with numbers.
    assert row["seeds"] == "2"
    assert {name: float(row[name]) for name in numbers} == numbers


def test_a_federation_of_real_clients_is_a_row_of_its_own(tmp_path: pathlib.Path) -> None:
    """Its clients hold other images than the simulated ones."""
    runs = tmp_path / "runs"
    for name in ("simulated", "real", "more"):
        write_run(runs / name)
    (runs / "real" / "clients.json").write_text('{"0": 20}')
    (runs / "more" / "clients.json").write_text('{"0": 30}')
    found = make(tmp_path, str(runs))
    assert [row["seeds"] for row in found] == ["1", "1", "1"]
    assert len({row["real clients"] for row in found}) == 3
