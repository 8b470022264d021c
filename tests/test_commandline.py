"""What all commands share: arguments that do not exist, and --help."""

import dataclasses
import re
import types
from typing import Any

import pytest

from mocosfl_jax import data, evaluate, join, serve, train
from mocosfl_jax.commandline import field_paths, guesses, help_text, parse
from mocosfl_jax.config import (
    CHOICES,
    PRESET_FIELDS,
    Clients,
    Config,
    Moco,
    comments,
    quickstart,
    resolve,
)
from mocosfl_jax.costs import __main__ as costs_command
from mocosfl_jax.errors import UserError
from mocosfl_jax.models import layers, named
from mocosfl_jax.preflight import __main__ as preflight

RATES = "--config.optim.server_lr=1, --config.optim.client_lr=1 or --config.resist.decoder_lr=1?"


@pytest.mark.parametrize("preset", ["v1", "small_v2", "v2", "large_v2"])
def test_a_preset_on_the_command_line_sets_all_that_is_not_given_there(preset: str) -> None:
    """The quickstart sets these fields too; a preset in a file fills in only what the file leaves open."""
    argv = ["train", f"--config.moco.preset={preset}", "--config.moco.augmentation=v1", "--config.epochs=3"]
    found = resolve(parse(argv, "").config).moco
    expected = resolve(Config(moco=Moco(preset=preset, augmentation="v1"))).moco
    for field in PRESET_FIELDS:
        assert getattr(found, field) == getattr(expected, field)
    assert found.temperature == quickstart().moco.temperature
    assert resolve(parse(argv[:1], "").config).moco.head == "linear"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--seed=3", "found --seed, did you mean --config.seed=3?"),
        ("config.seed=3", "found 'config.seed=3', did you mean --config.seed=3?"),
        ("workdir=run", "found 'workdir=run', did you mean --workdir=run?"),
        ("--workdirs", "found --workdirs, did you mean --workdir?"),
        ("--config.workdir=run", "(did you mean --workdir=run?), allowed: algorithm, seed"),
        (
            "--lr=1",
            f"found --lr, did you mean {RATES}",
        ),
        (
            "--config.lr=1",
            f"(did you mean {RATES})",
        ),
        (
            "--learning_rate=1",
            f"did you mean {RATES}",
        ),
        (
            "--config.optim.lr",
            "(did you mean --config.optim.server_lr or --config.optim.client_lr?)",
        ),
        ("--momentum=0", "did you mean --config.moco.momentum=0 or --config.optim.momentum=0?"),
        ("--num_clients=9", "did you mean --config.clients.num=9?"),
        ("--batch_size=9", "did you mean --config.clients.batch_size=9?"),
        ("--config.clients.size=9", "(did you mean --config.clients.batch_size=9?), allowed: num, cohort"),
        ("--epoch=9", "did you mean --config.epochs=9?"),
        ("--data=x", "did you mean --config.data.name=x, --config.data.dir=x or --config.data.image_size=x?"),
        ("--resume", "found --resume; the command that started a run resumes it"),
        ("--xyzzy", "found --xyzzy, allowed: --config=FILE, --config.FIELD=VALUE, --workdir=FOLDER"),
        ("xyzzy", "found 'xyzzy', allowed: --config=FILE"),
        ("--config.xyzzy=None", "config: found field 'xyzzy', allowed: algorithm"),
    ],
)
def test_the_argument_that_was_probably_meant(argument: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        train.parse(["train", argument])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        (train, ["--workdir="], "--workdir: found an empty path, allowed: a path; . is the current folder"),
        (serve, ["--listen=127.0.0.1:1", "--insecure", "--workdir="], "--workdir: found an empty path"),
        (train, [f"--config={'x' * 300}"], "File name too long"),
        (
            join,
            ["--server=127.0.0.1:1", "--data=.", "--patience=nan"],
            "--patience: found nan, allowed: a nu",
        ),
        (
            evaluate,
            ["--workdir=x", "--data.max_broken=nan"],
            "--data.max_broken: found nan, allowed: a number",
        ),
        (preflight, ["--programs="], "--programs: found , allowed: init, "),
    ],
)
def test_what_is_empty_or_no_number_is_refused(
    command: types.ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert command.main(["command", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_command_offers_its_own_flags_only(capsys: pytest.CaptureFixture) -> None:
    assert costs_command.main(["costs", "--workdir=run"]) == 2
    assert "--workdir=" not in capsys.readouterr().err
    assert costs_command.main(["costs", "--resume"]) == 2
    assert "found --resume, allowed: --config=FILE" in capsys.readouterr().err


@pytest.mark.parametrize("path", field_paths())
def test_the_last_part_of_a_field_finds_it(path: str) -> None:
    names = [f"config.{each}" for each in field_paths()]
    last = path.rpartition(".")[2]
    alike = [name for name in names if name.split(".")[-1] == last]
    # One name may also be a whole path or a section, which comes first: `data` is a section.
    if not any(name.removeprefix("config.").split(".")[0] == last for name in names):
        assert guesses(last, names) == alike[:3]
    assert guesses(path, names) == [f"config.{path}"]


def every_field(node: Any, path: str = "") -> dict[str, tuple[Any, str]]:
    """The value and the comment of every field, by its path."""
    found: dict[str, tuple[Any, str]] = {}
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            found |= every_field(value, f"{name}.")
        else:
            found[name] = value, comments(type(node))[field.name]
    return found


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_help_has_every_field_with_its_value_and_its_whole_comment(
    columns: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert train.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    fields = out[out.index("--config.algorithm") :]
    assert max(map(len, fields.splitlines())) <= columns
    flat = " ".join(fields.split())
    for path, (value, comment) in every_field(quickstart()).items():
        assert len(comment) > 10, path
        shown = rf"--config\.{path}={re.escape(str(value))} \([^)]+\) {re.escape(comment)}"
        assert re.search(shown, flat), path
    assert "(int) N, the number of clients in the pool." in flat
    assert "(linear, mlp, mlp_bn or None) Projection head." in flat
    assert "clients: The client pool, the cohort" in flat


def test_help_does_without_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(kind: type) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", unavailable)
    assert comments(Clients) == {}
    assert "--config.clients.num=20  (int)" in help_text("Train.")


def test_every_choice_is_checked() -> None:
    for path, words in CHOICES.items():
        *parents, name = path.split(".")
        for word in [*words, "xyzzy"]:
            config = Config(init_from="runs/other")  # without it there are no parts to choose
            node: Any = config
            for part in parents:
                node = getattr(node, part)
            setattr(node, name, word)
            if word == "xyzzy":
                with pytest.raises(UserError, match=f"config.{path}: found 'xyzzy', allowed: {words[0]}, "):
                    resolve(config)
            elif path != "algorithm":  # FL-MoCo with one image a client is refused for another reason
                resolve(config)


@pytest.mark.parametrize(
    "path, words",
    [
        ("data.name", data.NAMES),
        ("model.name", tuple(named.NETWORKS)),
        ("model.norm", layers.NORMS),
        ("model.init", layers.INITS),
        ("model.compute_dtype", named.COMPUTE_DTYPES),
    ],
)
def test_comments_name_what_data_and_networks_allow(path: str, words: Any) -> None:
    _, comment = every_field(Config())[path]
    assert set(words) <= set(re.findall(r"\w+", comment))
