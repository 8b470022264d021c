"""The page about runs: what it says, that it stands alone, and that nothing from a file is read as HTML."""

import base64
import html.parser
import json
import operator
import pathlib
import re
import shlex
import shutil
from typing import Any

import pytest

from mocosfl_jax import report, train
from mocosfl_jax.config import Config, quickstart, resolve
from mocosfl_jax.costs.__main__ import table
from mocosfl_jax.costs.accounting import from_config
from mocosfl_jax.page.command import command, paper_defaults
from mocosfl_jax.training import workdir
from mocosfl_jax.training.comparison import flat


class Page(html.parser.HTMLParser):
    """Tags, text and addresses of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.marked: list[bool] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag == "tr":
            self.rows.append([])
            self.marked.append(("class", "differs") in attributes)
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def row(self, name: str) -> tuple[list[str], bool]:
        """The cells of a field, and whether it is marked as differing."""
        (found,) = [
            ([" ".join(cell.split()) for cell in row[1:]], marked)
            for row, marked in zip(self.rows, self.marked, strict=True)
            if row and row[0].split()[0] == name
        ]
        return found


def make(out: pathlib.Path, *folders: pathlib.Path) -> Page:
    """Run the command and read its page."""
    assert report.main(["report", *(f"--workdir={each}" for each in folders), f"--out={out}"]) == 0
    return Page(out.read_text(encoding="utf-8"))


def write_run(folder: pathlib.Path, lines: list[dict[str, Any]], **fields: Any) -> pathlib.Path:
    """Write config.json and metrics.jsonl of a quickstart with `fields`, with __ for a dot."""
    config = quickstart()
    for name, value in fields.items():
        *parents, last = name.split("__")
        setattr(operator.attrgetter(".".join(parents))(config) if parents else config, last, value)
    folder.mkdir(parents=True)
    environment = {"python": "3.99.1", "commit": "abc123+changes", "device": "toaster"}
    (folder / "config.json").write_text(json.dumps(resolve(config).as_dict() | {"environment": environment}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


START = {"step": 0, "epoch": 0, "knn_backbone": 0.4811, "knn_projection": 0.3, "knn_raw_pixels": 0.7592}
FIRST = {"step": 60, "epoch": 1, "loss": 9.5, "top1": 0.1, "divergence": 0.01, "knn_backbone": 0.6134}


def test_the_page_of_a_finished_run(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = make(tmp_path / "report.html", finished)
    start, *_, last, probe = (
        json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()
    )
    for number in (
        *(start["knn_backbone"], start["knn_raw_pixels"], last["knn_backbone"]),
        *(probe["linear_probe"], probe["linear_probe_raw_pixels"]),
    ):
        assert f"{number:.3f}" in page.text
    assert "Finished, 3 epochs." in page.text
    assert page.row("clients.num") == (["4 paper: 100"], False)
    assert page.row("moco.momentum") == (["0.99"], False)
    record = json.loads((finished / "config.json").read_text())
    for name, version in record["environment"].items():
        assert page.row(name) == ([" ".join(version.split())], False)
    assert "FLOPs per image" in page.text and "smashed data" in page.text
    pictures = [a.removeprefix("data:image/png;base64,") for a in page.addresses if "image/png" in a]
    assert [base64.b64decode(each) for each in pictures] == [
        (finished / f"{name}.png").read_bytes() for name in ("partition", "neighbours", "embedding")
    ]


def test_the_page_needs_nothing_else(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = make(tmp_path / "report.html", finished)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert len(page.addresses) == 4
    assert all(address.startswith("data:image/") for address in page.addresses)
    source = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", source)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)


def test_an_unfinished_run_says_what_is_missing(tmp_path: pathlib.Path) -> None:
    page = make(tmp_path / "a.html", write_run(tmp_path / "run", [START, FIRST]))
    assert (
        "Unfinished: epoch 1 of 15 epochs. kNN 0.613 after epoch 1, untrained 0.481, raw pixels 0.759"
        in page.text
    )
    assert "0.146 below raw pixels" in page.text
    for name in ("partition.png", "neighbours.png", "embedding.png"):
        assert f"There is no {name}" in page.text
    page = make(tmp_path / "b.html", write_run(tmp_path / "new", []))
    assert "Unfinished: epoch 0 of 15 epochs. No accuracy of the trained network yet." in page.text


def test_differences_between_runs_and_from_the_paper_are_marked_and_first(tmp_path: pathlib.Path) -> None:
    one = write_run(tmp_path / "one", [START, FIRST], epochs=3, optim__server_lr=0.02)
    two = write_run(tmp_path / "two", [START], epochs=3, algorithm="flmoco")
    page = make(tmp_path / "report.html", one, two)
    assert page.row("algorithm") == (["mocosfl", "flmoco paper: mocosfl"], True)
    assert page.row("optim.server_lr") == (["0.02 paper: 0.06", "0.03 paper: 0.06"], True)
    assert page.row("epochs") == (["3 paper: 200", "3 paper: 200"], False)
    assert page.row("clients.batch_size") == (["5", "5"], False)  # the paper's value for 20 clients
    names = [row[0].split()[0] for row in page.rows if row]
    assert names.index("optim.server_lr") < names.index("epochs") < names.index("moco.momentum")
    assert f"2 of {len(flat(resolve(quickstart()).as_dict()))} fields differ" in page.text
    assert "config.algorithm: found flmoco, allowed: mocosfl (other costs are not modelled)" in page.text
    assert "one: Unfinished" in page.text and "two: Unfinished" in page.text


def test_a_run_with_functions_of_its_own(tmp_path: pathlib.Path) -> None:
    """Without them its configuration would be impossible: only an own contrast needs no queue."""
    fields = {"own__algorithm": lambda config, model, arguments: None, "moco__queue_size": 0}
    page = make(tmp_path / "a.html", write_run(tmp_path / "run", [START, FIRST], **fields))
    assert page.row("moco.queue_size") == (["0 paper: 6000"], False)
    assert (
        "python -m mocosfl_jax.train --config=FILE --config.moco.queue_size=0 --workdir=FOLDER" in page.text
    )


def test_what_files_hold_is_never_html(tmp_path: pathlib.Path) -> None:
    evil = "<script>alert('x')&amp;"
    # Of functions of a run's own, config.json holds the names.
    folder = write_run(tmp_path / evil, [START, FIRST], data__dir=evil)
    record = json.loads((folder / "config.json").read_text())
    record["own"]["network"] = evil
    (folder / "config.json").write_text(json.dumps(record))
    page = make(tmp_path / "report.html", folder)
    assert "script" not in page.tags
    assert page.row("data.dir") == ([f"{evil} paper: data"], False)
    assert page.row("own.network") == ([f"{evil} paper: None"], False)
    assert f"{tmp_path}/{evil}" in page.text
    assert "The costs of functions of your own are not known." in page.text
    assert "--config=FILE" in page.text


def test_names_that_are_not_utf8_or_the_same(tmp_path: pathlib.Path) -> None:
    odd = write_run(tmp_path / "caf\udce9", [START, FIRST])
    page = make(tmp_path / "a.html", odd)
    assert "caf\N{REPLACEMENT CHARACTER}" in page.text
    same = [write_run(tmp_path / parent / "_run$", [START]) for parent in "ab"]
    page = make(tmp_path / "b.html", *same, same[0])
    assert all(f"{folder}: Unfinished" in page.text for folder in same)


# Fields that a preset fills in.
LEFT: dict[str, Any] = {f"moco__{field}": None for field in ("head", "key_dim", "symmetric", "augmentation")}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"clients__num": 50, "seed": 3, "optim__server_lr": 0.5},
        {"clients__num": 7, "clients__batch_size": 2, "clients__seed": 5, "data__dir": "my data's"},
        {"moco__preset": "v1", "moco__key_dim": None, "model__width": None, "moco__symmetric": True},
        LEFT | {"moco__preset": "small_v2", "moco__key_dim": 128},
        LEFT | {"moco__preset": "large_v2", "moco__augmentation": "v1", "clients__batch_size": 3},
        {"algorithm": "flmoco", "optim__client_lr": 0.5, "clients__dirichlet_alpha": 0.3, "epochs": 200},
    ],
)
def test_the_command_gives_the_configuration_again(fields: dict[str, Any]) -> None:
    config = quickstart()
    for name, value in fields.items():
        *parents, last = name.split("__")
        setattr(operator.attrgetter(".".join(parents))(config) if parents else config, last, value)
    wanted = resolve(config)
    words = shlex.split(command(wanted, {}))
    assert words[:3] == ["python", "-m", "mocosfl_jax.train"]
    assert resolve(train.parse(words[2:]).config).as_dict() == wanted.as_dict()
    given = [word for word in words if word.startswith("--config.")]
    assert len(given) <= len(fields)


def test_a_folder_counts_once_however_it_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("toy", "other"):
        write_run(tmp_path / name, [START, FIRST])
    (tmp_path / "link").symlink_to("toy")
    monkeypatch.chdir(tmp_path)
    given = ("toy", "other", "toy/", "./toy", str(tmp_path / "toy"), "link")
    assert report.main(["report", *(f"--workdir={each}" for each in given), "--out=a.html"]) == 0
    assert capsys.readouterr().out == "a.html: 2 runs\n"
    assert re.findall(r"(\w+): Unfinished", Page(pathlib.Path("a.html").read_text()).text) == ["toy", "other"]


def test_the_paper_is_not_another_than_itself() -> None:
    paper = resolve(Config())
    assert paper_defaults(paper)["clients.num"] == 100
    differing = {
        name: value
        for name, value in paper_defaults(paper).items()
        if operator.attrgetter(name)(paper) != value and not name.startswith("own.")
    }
    assert differing == {}


@pytest.mark.parametrize(
    "arguments, line",
    [
        ([], "--workdir is missing"),
        (["--workdir={run}"], "--out is missing"),
        (["--workdir={run}", "--out={tmp}"], "--out: found {tmp}, allowed: a file in an existing folder"),
        (["--workdir={run}", "--out={tmp}/no/a.html"], "allowed: a file in an existing folder"),
        (
            ["--workdir={run}", "--out=/proc/a.html"],
            "--out: found /proc/a.html, allowed: a writable file",
        ),
        (["--workdir={tmp}/no", "--out={tmp}/a.html"], "--workdir: found no folder {tmp}/no"),
        (["--workdir={run}", "--workdir={tmp}", "--out={tmp}/a.html"], "{tmp}: holds no config.json"),
        (["--workdirs={run}", "--out={tmp}/a.html"], "--workdir"),
        (["{run}", "--out={tmp}/a.html"], "found"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], line: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    places = {"run": str(write_run(tmp_path / "run", [START])), "tmp": str(tmp_path)}
    assert report.main(["report", *(argument.format(**places) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert line.format(**places) in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("own", [[1], {"network": None, "magic": None}, "x"])
def test_functions_that_no_run_has_are_one_line(
    own: object, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder = write_run(tmp_path / "run", [START])
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"own": own}))
    assert report.main(["report", f"--workdir={folder}", f"--out={tmp_path / 'a.html'}"]) == 2
    error = capsys.readouterr().err
    assert "config.own: found " in error and error.count("\n") == 1


def test_names_that_are_no_text_are_shown(tmp_path: pathlib.Path) -> None:
    """A lone surrogate cannot be written as UTF-8."""
    folder = write_run(tmp_path / "run", [START])
    record = json.loads((folder / "config.json").read_text())
    record["environment"] = {"\ud800": "x"}
    (folder / "config.json").write_text(json.dumps(record))
    assert report.main(["report", f"--workdir={folder}", f"--out={tmp_path / 'a.html'}"]) == 0
    assert "\N{REPLACEMENT CHARACTER}" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("damage", ["{", "[]", '{"epochs": 3}'])
def test_damaged_files_are_one_line(
    damage: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder = write_run(tmp_path / "run", [START])
    out = tmp_path / "a.html"
    out.write_text("the last one")
    (folder / "config.json").write_text(damage)
    assert report.main(["report", f"--workdir={folder}", f"--out={out}"]) == 2
    (folder / "config.json").unlink()
    assert report.main(["report", f"--workdir={folder}", f"--out={out}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 2 and f"{folder}" in captured.err
    assert out.read_text() == "the last one"


def test_a_picture_that_is_none(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "embedding.png").write_bytes(b"half")
    (folder / "neighbours.png").unlink()
    page = make(tmp_path / "a.html", folder)
    assert "embedding.png is not a PNG file." in page.text
    assert "There is no neighbours.png: training draws it at its end" in page.text


def test_a_federation_of_real_clients(tmp_path: pathlib.Path) -> None:
    """Its costs are those of the clients' images, and its command is that of the server."""
    run = write_run(tmp_path / "run", [START, FIRST])
    clients = json.loads((run / "config.json").read_text())["clients"]["num"]
    (run / "clients.json").write_text(json.dumps({str(client): 100 for client in range(clients)}))
    page = make(tmp_path / "a.html", run)
    assert "python -m mocosfl_jax.serve " in page.text and "--listen=HOST:PORT --tls=FOLDER" in page.text
    assert "partition.png" not in page.text
    expected = table(from_config(workdir.read_config(run), 100 * clients, None))
    assert expected in page.text
