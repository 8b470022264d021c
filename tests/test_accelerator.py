"""For a real GPU or TPU: `pytest -m accelerator -n 0 tests/test_accelerator.py`. Other tests run on a CPU.

The golden cases, training by the command, and a run that is stopped and resumed.
"""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from mocosfl_jax.config import Clients, Config, Data, Eval, Moco, Model, Synchronization
from mocosfl_jax.models.forms import GPU, TPU, forms
from mocosfl_jax.training import checkpoint
from tests.support.algorithms import in_float64
from tests.support.golden import assert_equals_official, cases_in
from tests.support.small_run import arguments, metrics
from tests.support.training import comparable, prepare, train

pytestmark = pytest.mark.accelerator


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = cases_in(pathlib.Path(metafunc.config.getoption("--golden-dir")))
        metafunc.parametrize("case", cases, ids=lambda path: path.name)


def test_golden(case: pathlib.Path, x64: None) -> None:
    assert_equals_official(case, forms(jax.devices()[0].platform))


def test_the_command_trains_here(images: str, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "mocosfl_jax.train", *arguments(images, tmp_path)[1:]]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    recorded = json.loads((tmp_path / "config.json").read_text())["environment"]
    assert recorded["device"] == jax.devices()[0].device_kind
    lines = metrics(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3, 3]
    assert all(np.isfinite(value) for line in lines for value in line.values())


def test_a_stopped_run_resumes_where_it_was(images: str, tmp_path: pathlib.Path, x64: None) -> None:
    """Up to rounding, since some kernels of accelerators add in a varying order.

    In float64: six steps of this network make a difference of 1e-7 in the parameters one of 1e-4 in the loss.
    """
    run = prepare(
        Config(
            epochs=2,
            data=Data(name="npz", dir=images),
            clients=Clients(num=4, batch_size=2, noniid_ratio=0.5),
            sync=Synchronization(frequency=3),
            model=Model(width=4),
            moco=Moco(key_dim=8, queue_size=20),
            eval=Eval(knn_k=5, probe_epochs=2),
        )
    )
    assert run.forms in (GPU, TPU)
    init = run.algorithm.init
    run = run._replace(algorithm=run.algorithm._replace(init=lambda *args: in_float64(init(*args))))
    assert train(run, tmp_path / "whole")
    assert not train(run, tmp_path / "stopped", stop_at=lambda line: line["epoch"] == 1)
    assert train(run, tmp_path / "stopped")
    whole, stopped = comparable(tmp_path / "whole"), comparable(tmp_path / "stopped")
    assert [line["step"] for line in stopped] == [line["step"] for line in whole]
    for ours, theirs in zip(stopped[1:-1], whole[1:-1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    device = jax.devices()[0]
    states = [
        checkpoint.restore(tmp_path / name / "checkpoints", None, run.algorithm, device)[0]
        for name in ("whole", "stopped")
    ]
    assert all(leaf.dtype != np.float32 for leaf in jax.tree.leaves(states))
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
