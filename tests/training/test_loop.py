"""The loop in one process: one compilation for a whole run, and stopping at any moment changes nothing."""

import pathlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mocosfl_jax.config import Clients, Config, Data, Eval, Moco, Model, Synchronization
from mocosfl_jax.evaluation import monitor
from mocosfl_jax.training import workdir
from mocosfl_jax.training.experiment import Run
from tests.support.toy import IMAGE, make_toy_model
from tests.support.training import Metrics, comparable, prepare, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five of six clients per epoch, rounds of 3, 3 and 1 steps, an evaluation in every second epoch.

    It uses the toy network instead of the ResNet to keep compilation cheap.
    """
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    labels = np.arange(84) % 3
    pictures = rng.integers(0, 256, (84, *IMAGE)).astype(np.uint8)
    np.savez(path, x_train=pictures, y_train=labels, x_test=pictures[:20], y_test=labels[:20])
    return prepare(
        Config(
            epochs=4,
            data=Data(name="npz", dir=str(path)),
            clients=Clients(num=6, cohort=5, batch_size=2, noniid_ratio=1.0),
            sync=Synchronization(frequency=2),
            model=Model(width=4),
            moco=Moco(key_dim=8, queue_size=20),
            eval=Eval(every=2, knn_k=3, probe_epochs=2),
        ),
        model=make_toy_model(),
    )


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, int]]:
    """The workdir of a whole run, and how often each function of its algorithm was traced."""
    traces: dict[str, int] = {}

    def counting(name: str, function: Callable) -> Callable:
        def counted(*args: Any) -> Any:
            traces[name] = traces.get(name, 0) + 1
            return function(*args)

        return counted

    counted: Any = {
        name: counting(name, getattr(run.algorithm, name)) for name in ("init", "step", "sync", "encode")
    }
    algorithm = run.algorithm._replace(**counted)
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(run._replace(algorithm=algorithm), folder)
    return folder, traces


def test_everything_is_compiled_once_for_the_whole_run(
    run: Run, undisturbed: tuple[pathlib.Path, dict[str, int]]
) -> None:
    folder, traces = undisturbed
    assert (run.steps_per_epoch, run.steps_per_round) == (7, 3)
    assert [m["epoch"] for m in workdir.read_metrics(folder)] == [0, 1, 2, 3, 4, 4]
    assert traces == {"init": 1, "step": 1, "sync": 1, "encode": 1}


@pytest.mark.parametrize(
    "moment, stop_at",
    [
        ("before the first step", lambda m: m["epoch"] == 0),
        ("after an epoch", lambda m: m["epoch"] == 1),
        ("after an evaluation", lambda m: m["epoch"] == 2),
        ("after the last epoch, before the probe", lambda m: m["epoch"] == 4),
    ],
)
def test_a_stopped_run_resumes_as_if_uninterrupted(
    run: Run,
    undisturbed: tuple[pathlib.Path, dict[str, int]],
    tmp_path: pathlib.Path,
    moment: str,
    stop_at: Callable[[Metrics], bool],
) -> None:
    assert not train(run, tmp_path, stop_at), moment
    assert comparable(tmp_path) == comparable(undisturbed[0])[: len(comparable(tmp_path))]
    assert train(run, tmp_path)
    assert comparable(tmp_path) == comparable(undisturbed[0])


def test_features_are_let_go_after_their_evaluation(
    run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those of the last epoch are kept, for the linear probe."""
    made: list[weakref.ref] = []
    features = monitor.features

    def watched(*args: Any) -> monitor.Evaluated:
        train_and_test = features(*args)
        made.append(weakref.ref(train_and_test[0].backbone))
        return train_and_test

    def never(metrics: Metrics) -> bool:
        alive.append([each() is not None for each in made])
        return False

    monkeypatch.setattr(monitor, "features", watched)
    alive: list[list[bool]] = []  # at each line of metrics, for each evaluation so far
    assert train(run, tmp_path, never)
    untrained, one, two, three, four, probe = alive
    assert untrained == one == [False]
    assert two == three == [False, False]
    assert four == probe == [False, False, True]


def test_an_incomplete_last_line_is_written_again(
    run: Run, undisturbed: tuple[pathlib.Path, dict[str, int]], tmp_path: pathlib.Path
) -> None:
    assert train(run, tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert train(run, tmp_path)
    assert comparable(tmp_path) == comparable(undisturbed[0])


def test_missing_metrics_are_not_invented(run: Run, tmp_path: pathlib.Path) -> None:
    assert train(run, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: found 0 lines, the checkpoint was saved after 5"):
        train(run, tmp_path)


def test_an_undisturbed_run_is_reproducible(
    run: Run, undisturbed: tuple[pathlib.Path, dict[str, int]], tmp_path: pathlib.Path
) -> None:
    assert train(run, tmp_path)
    assert comparable(tmp_path) == comparable(undisturbed[0])
    for m in comparable(tmp_path):
        assert all(np.isfinite(value) for value in m.values())
