"""The header names what a reader of the output could not know otherwise."""

import pathlib

import pytest
from PIL import Image

from mocosfl_jax.train import main, parse
from mocosfl_jax.training import report
from tests.support.data_files import small, write_folder
from tests.support.small_run import arguments
from tests.support.training import prepare


def test_files_that_are_not_used_are_counted_and_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    write_folder(tmp_path / "set", small())
    for name in ("a.heic", "b.heic", ".hidden.png"):
        (tmp_path / "set" / "train" / "class0" / name).write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "test" / "beside.png")
    argv = arguments(
        str(tmp_path / "set"),
        tmp_path / "run",
        *("--config.data.name=image_folder", "--config.clients.batch_size=1", "-v"),
    )
    run = prepare(parse(argv).config)
    rows = dict(line.split(maxsplit=1) for line in report.header(run).splitlines())
    assert rows["not"] == "used     2 of type .heic, 1 hidden, 1 beside the class folders (named with -v)"
    assert "not used" not in report.header(run._replace(dataset=run.dataset._replace(unused=())))

    # They are named before the run begins, and so before it is refused here.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    assert main(argv) == 2
    named = capsys.readouterr().out.splitlines()
    assert f"not used: {tmp_path}/set/train/class0/a.heic (of type .heic)" in named
    assert f"not used: {tmp_path}/set/test/beside.png (beside the class folders)" in named
    assert len(named) == 4
