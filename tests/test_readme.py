"""The programs, commands and links in README and docs/ work."""

import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from mocosfl_jax import split_model
from mocosfl_jax.config import resolve
from mocosfl_jax.weights.encoder_file import Metadata, export_encoder

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def programs(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_program_runs() -> None:
    (program,) = programs("README.md")
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
    program, *_ = programs("docs/encoders.md")
    imports, *lines = [line for line in program.splitlines() if line.strip()]
    assert imports.startswith("from mocosfl_jax import") and len(lines) == 3
    names: dict = {"images": np.zeros((2, 16, 16, 3), np.uint8)}
    exec(program, names)
    assert names["features"].shape == (2, 32)


def test_features_and_probes_as_the_reference_shows_them(
    finished: pathlib.Path, images: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "runs" / "quickstart")
    encoding, probing = programs("docs/reference/evaluation.md")
    with np.load(images) as arrays:
        names: dict = {"jax": jax, "images": arrays["x_train"], "train_labels": arrays["y_train"]}
        exec(encoding, names)
        names["train"] = names["features"]
        names |= {"images": arrays["x_test"], "test_labels": arrays["y_test"]}
        exec(encoding, names)
        names["test"] = names["features"]
    exec(probing, names)
    assert names["train"].backbone.shape == (48, 32) and names["test"].projection.shape == (12, 8)
    assert 0 <= names["accuracy"] <= 1 and 0 <= names["probe"].last_epoch <= 1


def test_readme_is_short_and_shows_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    start = lines.index("```console")
    assert [line[:2] for line in lines[start + 1 : start + 4]] == ["$ ", "$ ", "``"]


def test_a_configuration_in_the_docs_is_valid() -> None:
    (program,) = programs("docs/experiments.md")
    names: dict = {}
    exec(program, names)
    assert resolve(names["get_config"]("1000")).clients.cohort == 100


LINK = re.compile(r"\]\(([\w./-]+)(?:#[\w-]+)?\)")
FOLDERS = [p.parent.name for p in (ROOT / "mocosfl_jax").glob("*/__init__.py")]
FOLDERS += ["benchmarks", "configs", "docs", "examples", "launch", "scripts", "tests"]
FILE = re.compile(rf"(?:--config=|`|pytest )((?:{'|'.join(FOLDERS)})/[\w./]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_named_file_exists(page: pathlib.Path) -> None:
    for name in LINK.findall(page.read_text()):
        assert (page.parent / name).exists(), name
    for name in FILE.findall(page.read_text()):
        assert any((parent / name).exists() for parent in (ROOT, ROOT / "mocosfl_jax")) or "NAME" in name, (
            name
        )


def test_names_of_files_are_recognised() -> None:
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    assert "algorithm/moco.py" in FILE.findall(architecture)
    assert "reference/models.md" in LINK.findall(architecture)
