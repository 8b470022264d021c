"""Every file in configs/ is an experiment that runs."""

import pathlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import pytest
from jax import Array

from mocosfl_jax.commandline import load_config
from mocosfl_jax.config import Config, Data, Model, quickstart, resolve
from tests.support.training import prepare

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
PARAMETERS = {
    "cifar10_cross_silo": ["5", "20"],
    "cifar100_cross_silo": ["5", "20"],
    "cifar10_noniid": ["100", "200", "1000"],
    "cifar100_noniid": ["100", "200", "1000"],
    "imagenet12_noniid": ["100", "200", "1000"],
    "deep_cut": ["mocosfl", "monacosfl"],
    "resistant_expert": ["0", "0.005", "0.01"],
    "taressfl": ["100", "1000"],
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """2,000 images of 8 pixels and 20 classes."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    x = np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 3)).astype(np.uint8)
    y = np.arange(2000) % 20
    np.savez(path, x_train=x, y_train=y, x_test=x[:50], y_test=y[:50])
    return str(path)


def load(name: str, *parameter: str) -> Config:
    return load_config(str(FOLDER / f"{name}.py"), parameter)


def test_every_parameter_belongs_to_a_file() -> None:
    assert set(PARAMETERS) <= set(NAMES)


def test_the_default_run_has_a_file() -> None:
    assert load("quickstart") == quickstart()


def step_and_sync(name: str, generated: str) -> tuple[Callable[..., tuple[Array, Any, Any]], np.ndarray]:
    """A configuration with generated images and a network narrow enough for a test; otherwise unchanged.

    Returns a function that gives a step's loss and the states before and after it, and the step's images.
    """
    config = load(name)
    width = 16 if config.model.name == "mobilenetv2" else 4
    config.data = Data(name="npz", dir=generated, image_size=32 if "vgg" in config.model.name else None)
    config.model = Model(name=config.model.name, cut_layer=config.model.cut_layer, width=width)
    config.moco.key_dim = 8
    if config.resist.source:
        config.resist.source, config.resist.source_dir, config.resist.target_share = "npz", generated, 0.5
    run = prepare(config)

    def one_step(rng: Array, images: Array) -> tuple[Array, Any, Any]:
        start = run.algorithm.init(rng)
        state, info = run.algorithm.step(run.algorithm.enter(start, members), run.make_views(rng, images))
        state, _ = run.algorithm.sync(state)
        return info.loss, start, run.algorithm.leave(state)

    members = None if run.whole_pool else run.members(0)
    batch = np.stack([np.resize(run.parts[i], run.batch_sizes.max()) for i in run.members(0)])
    return one_step, run.views[batch]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_step(name: str, generated: str) -> None:
    """Only shapes are computed; this is where incompatible options meet."""
    one_step, images = step_and_sync(name, generated)
    loss, start, end = jax.eval_shape(one_step, jax.random.key(0), images)
    assert (loss.shape, loss.dtype) == ((), np.float32)
    chex.assert_trees_all_equal_shapes_and_dtypes(start, end)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_every_config_is_finite(name: str, generated: str) -> None:
    one_step, images = step_and_sync(name, generated)
    results = jax.jit(one_step)(jax.random.key(0), images)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))


@pytest.mark.parametrize("name, parameter", [(n, p) for n, ps in PARAMETERS.items() for p in ps])
def test_every_parameter_resolves(name: str, parameter: str) -> None:
    config = resolve(load(name, parameter))
    if name == "resistant_expert":
        assert config.clients.num == 1 and config.resist.target_share == float(parameter)
        assert config.clients.batch_size == (256 if float(parameter) else 128)
        return
    if parameter.isdigit():
        assert config.clients.num == int(parameter)
    # The paper trains on 100 images per step for 200 passes over the data.
    assert config.clients.cohort is not None and config.clients.batch_size is not None
    if "deep_cut" not in name:
        assert config.clients.cohort * config.clients.batch_size == 100
        assert config.total_epochs * config.clients.cohort == 200 * config.clients.num


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_how_to_run_it(name: str) -> None:
    header = (FOLDER / f"{name}.py").read_text().split('"""')[1]
    assert "python -m mocosfl_jax.train" in header
    if name != "quickstart":
        assert f"--config=configs/{name}.py" in header
