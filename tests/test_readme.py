"""What README says can be done."""

import pathlib
import re

import jax
import numpy as np
import pytest

from mocosfl_jax import split_model
from mocosfl_jax.weights.encoder_file import Metadata, export_encoder

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_program_runs() -> None:
    program, _ = PROGRAMS
    assert len([line for line in program.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(program, names)
    assert names["features"].shape == (4, 128)
    assert int(names["state"].step) == 6


def test_an_encoder_is_used_in_three_lines(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = {"name": "resnet18", "cut_layer": 1, "width": 4, "key_dim": 8, "image_size": 16}
    like = jax.eval_shape(split_model(**network).init, jax.random.key(0))  # type: ignore[arg-type]
    client, server = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), like)
    export_encoder(
        tmp_path / "encoder.safetensors", client, server, Metadata(network, (0.5,) * 3, (0.25,) * 3)
    )
    _, program = PROGRAMS
    imports, *lines = [line for line in program.splitlines() if line.strip()]
    assert imports.startswith("from mocosfl_jax import") and len(lines) == 3
    names: dict = {"images": np.zeros((2, 16, 16, 3), np.uint8)}
    exec(program, names)
    assert names["features"].shape == (2, 32)


def test_every_file_it_names_is_there() -> None:
    root = pathlib.Path(__file__).parents[1]
    names = re.findall(r"\]\(([\w./-]+)\)", README)
    assert names
    for name in names:
        assert (root / name).exists(), name
