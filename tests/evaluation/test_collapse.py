"""Collapsed features are noticed, reported once, and end the run if that is asked for."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from mocosfl_jax.config import Clients, Config, Data, Eval, Moco, Model, Optim, Synchronization
from mocosfl_jax.errors import CollapsedError
from mocosfl_jax.evaluation import monitor
from mocosfl_jax.evaluation.collapse import spread
from mocosfl_jax.training import report, workdir
from tests.support.toy import IMAGE, make_toy_model
from tests.support.training import prepare, train


def test_spread_is_the_variance_of_the_directions() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 7)) + 0.5
    total = 0.0
    for row in rows:
        for other in rows:
            total += 1 - row @ other / np.linalg.norm(row) / np.linalg.norm(other)
    assert spread(rows) == pytest.approx(total / 50**2)  # mean of 1 - cosine over all pairs


def test_spread_of_almost_equal_float32_rows_is_not_lost() -> None:
    rows = np.ones((4, 3), np.float32)
    rows[0, 0] += 1e-5
    assert 1e-12 < spread(rows) < 1e-10


def constant_head(params: dict[str, Array], backbone: Array) -> Array:
    """The same projection for every image."""
    return jnp.broadcast_to(params["head"][0], (*backbone.shape[:-1], params["head"].shape[1]))


@pytest.fixture
def config(tmp_path: pathlib.Path) -> Config:
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (40, *IMAGE)).astype(np.uint8), np.arange(40) % 2
    path = tmp_path / "images.npz"
    np.savez(path, x_train=pictures, y_train=labels, x_test=pictures[:20], y_test=labels[:20])
    return Config(
        epochs=3,
        data=Data(name="npz", dir=str(path)),
        clients=Clients(num=4, batch_size=2, noniid_ratio=1.0),
        sync=Synchronization(frequency=1),
        model=Model(width=4),
        moco=Moco(key_dim=8, queue_size=16),
        optim=Optim(server_lr=1e-3),
        eval=Eval(every=0, knn_k=3, probe_epochs=0),
    )


def test_a_collapse_is_reported_once_and_training_goes_on(config: Config, tmp_path: pathlib.Path) -> None:
    run = prepare(config, model=make_toy_model()._replace(head=constant_head))
    lines: list[str] = []
    assert train(run, tmp_path, say=lines.append)
    epochs = [m for m in workdir.read_metrics(tmp_path) if "loss" in m]
    assert [m["collapsed"] for m in epochs] == [1, 1, 1]
    # Once the queue holds such keys, InfoNCE cannot tell them apart.
    assert epochs[-1]["loss"] == pytest.approx(2 * np.log(16 + 1), rel=1e-3)
    assert report.constant_loss(run.config) == pytest.approx(2 * np.log(16 + 1))
    (line,) = [line for line in lines if "collapsed" in line]
    assert "5.666 if all keys were equal" in line and "\n" not in line


def test_a_network_that_learns_is_not_reported(config: Config, tmp_path: pathlib.Path) -> None:
    lines: list[str] = []
    assert train(prepare(config, model=make_toy_model()), tmp_path, say=lines.append)
    epochs = [m for m in workdir.read_metrics(tmp_path) if "loss" in m]
    assert all(m["collapsed"] == 0 and m["spread"] > 0.1 for m in epochs)
    assert not any("collapsed" in line for line in lines)


def test_a_collapse_ends_the_run_if_asked(config: Config, tmp_path: pathlib.Path) -> None:
    config.eval.stop_on_collapse = True
    run = prepare(config, model=make_toy_model()._replace(head=constant_head))
    for epoch in (1, 2):  # the same call goes on, and notices it again
        with pytest.raises(CollapsedError, match="stop_on_collapse"):
            train(run, tmp_path)
        assert workdir.read_metrics(tmp_path)[-1]["epoch"] == epoch
        assert (tmp_path / "checkpoints" / str(epoch * run.steps_per_epoch)).is_dir()


def test_of_a_single_image_nothing_is_said() -> None:
    """Its spread would be 0, as of features that are all equal."""

    unused: Any = None
    assert monitor.collapsed(np.zeros((1, 4, 4, 3), np.uint8), unused, unused) == {}
