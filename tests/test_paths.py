"""Paths in flags and fields: the home folder, URLs, and names that C++ cannot open."""

import os
import pathlib
import shutil

import pytest

from mocosfl_jax import attack, commandline, encode, evaluate, export, import_official, table, train
from mocosfl_jax.costs import __main__ as costs
from mocosfl_jax.data import load
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import replacing, user_path, utf8_path


def test_the_home_folder_is_expanded_everywhere(
    images: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(images, tmp_path / "a.npz")
    assert len(load("npz", "~/a.npz", image_size=None).x_train) == 48
    (tmp_path / "config.py").write_text(
        "from mocosfl_jax.config import Config\nget_config = lambda epochs='7': Config(epochs=int(epochs))\n"
    )
    for file, epochs in (("~/config.py", 7), ("~/config.py:3", 3)):
        options = train.parse(["train", f"--config={file}", "--workdir=~/run"])
        assert (options.config.epochs, options.folder) == (epochs, tmp_path / "run")
    assert commandline.output_file("~/x.npz") == tmp_path / "x.npz"
    assert user_path("--workdir", "a~/~") == pathlib.Path("a~/~")


def test_a_file_is_replaced_by_one_that_is_new(tmp_path: pathlib.Path) -> None:
    """Links of a folder from elsewhere are not followed, and files with similar names stay."""
    outside, path = tmp_path / "outside", tmp_path / "run" / "x.json"
    outside.write_text("before")
    path.parent.mkdir()
    path.with_name("x.json.tmp").symlink_to(outside)
    path.symlink_to(outside)
    before = os.umask(0o027)
    try:
        with replacing(path) as temporary:
            temporary.write_text("new")
            with replacing(path) as another:  # of a second process
                another.write_text("newer")
    finally:
        os.umask(before)
    assert outside.read_text() == "before" and path.with_name("x.json.tmp").is_symlink()
    assert not path.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    assert {file.name for file in path.parent.iterdir()} == {"x.json", "x.json.tmp"}


def test_a_file_that_cannot_be_made_is_named_as_it_was_given(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "nowhere" / "x.json"
    with pytest.raises(FileNotFoundError, match=f"'{path}'"), replacing(path):
        pass


def test_a_device_is_not_replaced(tmp_path: pathlib.Path) -> None:
    """As root, a new file would take the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"^--out: found .*pipe, allowed: a file in an existing folder$"):
        commandline.output_file(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    "command, arguments",
    [
        (train, ["--workdir={}"]),
        (train, ["--config={}"]),
        (train, ["--workdir={tmp}/run", "--config.data.name=npz", "--config.data.dir={}"]),
        (costs, ["--config={}"]),
        (evaluate, ["--workdir={}"]),
        (evaluate, ["--workdir={run}", "--data.dir={}"]),
        (evaluate, ["--workdir={run}", "--data.name=npz", "--data.dir={}"]),
        (attack, ["--workdir={}"]),
        (attack, ["--workdir={run}", "--data.dir={}"]),
        (attack, ["--workdir={run}", "--out={}"]),
        (attack, ["--encoder={}", "--out={tmp}"]),
        (attack, ["--official_clients={}", "--out={tmp}"]),
        (encode, ["--workdir={}", "--images={tmp}", "--out={tmp}/x"]),
        (encode, ["--workdir={run}", "--images={}", "--out={tmp}/x"]),
        (encode, ["--workdir={run}", "--images={tmp}", "--out={}"]),
        (encode, ["--workdir={run}", "--data.name=npz", "--data.dir={}", "--out={tmp}/x"]),
        (table, ["{}"]),
        (table, ["{run}", "--out={}"]),
        (export, ["--workdir={}", "--out={tmp}/x"]),
        (export, ["--workdir={run}", "--out={}"]),
        (import_official, ["--client={}", "--server={tmp}/x", "--config={config}", "--out={tmp}/x"]),
        (import_official, ["--client={tmp}/x", "--server={}", "--config={config}", "--out={tmp}/x"]),
        (import_official, ["--client={tmp}/x", "--server={tmp}/x", "--config={config}", "--out={}"]),
    ],
)
def test_a_url_is_refused_in_one_line(
    command: object,
    arguments: list[str],
    finished: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = pathlib.Path(__file__).parents[1] / "configs" / "cifar10_noniid.py"
    argv = [a.format("s3://bucket/x.py", run=finished, tmp=tmp_path, config=config) for a in arguments]
    assert command.main(["command", *argv]) == 2  # type: ignore[attr-defined]
    error = capsys.readouterr().err
    assert "found 's3://bucket/x.py', allowed: a path; URLs are not opened" in error
    assert error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_home_folder_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--out: found '~nobody_here/x', allowed: a path without ~"):
        user_path("--out", "~nobody_here/x")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # neither HOME nor an entry in passwd
    with pytest.raises(UserError, match=r"--out: found '~/x', allowed: a path without ~"):
        user_path("--out", "~/x")


def test_a_workdir_has_to_be_utf8(capsys: pytest.CaptureFixture) -> None:
    """Orbax opens it in C++, where other names failed when the first checkpoint was saved."""
    assert utf8_path("--workdir", "/wörk") == pathlib.Path("/wörk")
    assert train.main(["train", "--workdir=/w\udcff"]) == 2
    error = capsys.readouterr().err
    assert r"--workdir: found '/w\udcff', allowed: a path in UTF-8" in error and error.count("\n") == 1
