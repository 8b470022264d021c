"""Nothing that happens to standard output or standard error ends a command or harms its files."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.runtime.streams import text_stream

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_what_nobody_will_read_is_dropped() -> None:
    reading, writing = os.pipe()
    stream = text_stream(writing)
    print("read", file=stream)
    assert os.read(reading, 99) == b"read\n"
    os.close(reading)
    for _ in range(3):
        print("lost" * 9999, file=stream, flush=True)
    stream.close()
    os.close(writing)


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "ascii").open("w", encoding="ascii") as file:
        stream = text_stream(file.fileno(), file)
        print("brökén \udcff", file=stream, flush=True)
    assert (tmp_path / "ascii").read_bytes() == rb"br\xf6k\xe9n \udcff" + b"\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_an_error() -> None:
    with open("/dev/full", "wb") as file, pytest.raises(OSError, match="No space left"):
        print("x", file=text_stream(file.fileno()), flush=True)


def test_closed_streams_and_an_ascii_locale(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The output file is whole: nothing printed ends up in it, and names are as in any other locale."""
    pictures = tmp_path / "bilder_ä"
    pictures.mkdir()
    Image.new("RGB", (16, 16)).save(pictures / "ü.png")
    (pictures / "brökén.png").write_text("not an image")
    command = '"$0" -m mocosfl_jax.encode --workdir="$1" --images="$2" --out="$3" >&- 2>&-'
    out = tmp_path / "merkmale_ö.npz"
    argv = ["sh", "-c", command, sys.executable, str(finished), str(pictures), str(out)]
    assert subprocess.run(argv, env=os.environ | ASCII).returncode == 0
    with np.load(out) as arrays:
        assert arrays["files"].tolist() == ["ü.png"]
        assert arrays["backbone"].shape == (1, 32)


def test_a_reader_that_ends_early() -> None:
    argv = [sys.executable, "-m", "mocosfl_jax.costs", "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
