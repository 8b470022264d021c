"""The examples of your own network, algorithm and loop run at toy size, and do what they say."""

import ast
import inspect
import json
import pathlib
import pkgutil
import re
import runpy
from typing import Any

import jax
import numpy as np
import pytest
from scipy.stats import trim_mean

from mocosfl_jax import train
from mocosfl_jax.config import Moco, Model, quickstart
from tests.support.small_run import write_images
from tests.support.training import prepare

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
CONFIGS = ["byol.py", "optimizers.py", "own_network.py", "proximal.py", "trimmed_mean.py"]
TOY = {
    "epochs": 2,
    "data.name": "npz",
    "clients.num": 4,
    "clients.batch_size": 2,
    "clients.noniid_ratio": 0.5,
    "model.name": "resnet18",  # which takes images of any size
    "model.stem_stride": 1,
    "model.width": 4,
    "moco.key_dim": 8,
    "eval.every": 1,
    "eval.knn_k": 5,
    "eval.probe_epochs": 2,
    "mesh.data": 1,
    "mesh.model": 1,
}


PAGES = (EXAMPLES.parent / "docs" / "reference").glob("*.md")
LISTED = {name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)}


def names_of_the_package(tree: ast.Module) -> set[str]:
    """Full names of all that a script takes from the package; for a module, of what is taken from it."""
    found, modules = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mocosfl_jax"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if inspect.ismodule(pkgutil.resolve_name(full)):
                    modules[alias.asname or alias.name] = full
                else:
                    found.add(full)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.add(f"{modules[node.value.id]}.{node.attr}")
    return found


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_use_what_the_reference_lists(path: pathlib.Path) -> None:
    tree = ast.parse(path.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in attributes if re.match(r"_(?!replace$|asdict$)", name)]
    names = names_of_the_package(tree)
    assert names
    for name in names:
        assert not any(part.startswith("_") for part in name.split(".")), name
        parents = [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]
        value = pkgutil.resolve_name(name)
        home = getattr(value, "__module__", parents[0])
        public = name in LISTED or home in LISTED or f"{home}.{name.rsplit('.', 1)[1]}" in LISTED
        assert public or LISTED & set(parents), name


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("data") / "images.npz", (8, 8, 3))


@pytest.mark.usefixtures("short_resnet")
@pytest.mark.parametrize("name", CONFIGS)
def test_each_trains_by_the_command(name: str, images: str, tmp_path: pathlib.Path) -> None:
    fields = [f"--config.{field}={value}" for field, value in (TOY | {"data.dir": images}).items()]
    argv = ["train", f"--config={EXAMPLES / name}", *fields, f"--workdir={tmp_path}"]
    assert train.main(argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 2]
    assert all(np.isfinite(line["loss"]) for line in lines[1:3])
    own = json.loads((tmp_path / "config.json").read_text())["own"]
    assert any(found and found.startswith(f"{name.removesuffix('.py')}.") for found in own.values())


def test_the_trimmed_mean_is_scipys() -> None:
    mean = runpy.run_path(str(EXAMPLES / "trimmed_mean.py"))["trimmed_mean"]
    stacked = np.random.default_rng(0).normal(size=(20, 3, 2)).astype(np.float32)
    stacked[3] = 1e6  # a bad client
    got = mean({"kernel": stacked}, None)["kernel"]
    np.testing.assert_allclose(got, trim_mean(stacked, 0.1, axis=0), rtol=1e-5)
    assert np.abs(got).max() < 1


def test_the_proximal_term_is_half_the_squared_distance() -> None:
    proximal = runpy.run_path(str(EXAMPLES / "proximal.py"))["proximal"]
    a, b = ({"w": np.array([1.0, 2.0]), "b": np.array(x)} for x in (3.0, 5.0))
    assert float(proximal(a, b, 0.1)) == pytest.approx(0.05 * 4)


def test_byol_takes_clients_of_unequal_sizes() -> None:
    """It has no queue that could be too small for their keys."""
    config = runpy.run_path(str(EXAMPLES / "byol.py"))["get_config"]()
    config.clients.rich, config.clients.rich_batch = 0.2, 2
    assert set(prepare(config).batch_sizes.tolist()) == {5, 10}


def test_byol_compares_guesses_and_keys() -> None:
    module = runpy.run_path(str(EXAMPLES / "byol.py"))
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 5, 8)).astype(np.float32)
    params = {"predictor": module["predictor"].init(jax.random.key(0), query)}
    guess = np.asarray(module["predictor"].apply(params["predictor"], query))
    found = module["byol"](params, query, key, None)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (guess, key)]
    np.testing.assert_allclose(found.loss, np.mean(2 - 2 * np.sum(unit[0] * unit[1], axis=1)), rtol=1e-5)
    nearest = np.argmax(unit[0] @ unit[1].T, axis=1)
    assert float(found.top1) == pytest.approx(np.mean(nearest == np.arange(5)))


def test_the_own_loop_logs_stops_early_and_tunes(
    images: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)  # where Python finds modules beside a script
    main = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]
    config = quickstart()
    config.epochs = 30
    config.clients.num, config.clients.batch_size, config.clients.noniid_ratio = 4, 2, 0.5
    config.model = Model(name="resnet18", width=4, stem_stride=1, init="xavier")
    config.moco = Moco(key_dim=8, queue_size=20, augmentation="v1", min_crop_scale=0.5)
    config.optim.server_lr = config.optim.client_lr = 0.01
    config.eval.knn_k, config.eval.every = 5, 1
    config.mesh.data = config.mesh.model = 1
    arrays: dict[str, Any] = dict(np.load(images))
    accuracy = main(config, tmp_path, arrays, share=1.0, epochs=200)
    assert accuracy > 0.8  # four classes of distinct colours
    epochs = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") - 1
    assert 3 <= epochs < 30
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
