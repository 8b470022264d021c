"""The benchmarks without PyTorch: the clock, the output lines, the command, and our side on a tiny network.

PyTorch is not among the packages of the tests. The benchmarks themselves check, each time they run, that the
PyTorch loop computes the same as ours (`benchmarks/agreement.py`).
"""

import importlib
import json
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import (
    augment,
    clients,
    data,
    epoch,
    evaluation,
    host,
    limit,
    memory,
    results,
    scaling,
    settings,
    wire,
)
from benchmarks.settings import NARROW, Setting
from benchmarks.timing import finished, medians, stepper
from mocosfl_jax.config import Config, quickstart, resolve
from mocosfl_jax.training.build import build_model, constant_network
from tests.support.toy import make_toy_model

TINY = Setting(clients=3, batch=2, width=4, stem_stride=4, key_dim=8, queue_size=20, image_size=16)


@pytest.fixture(scope="module")
def compiled() -> settings.Step:
    return settings.compile_step(TINY)


def fresh(step: settings.Step) -> settings.Step:
    """The step with a copy of its state, because a call donates the state."""
    return step._replace(state=jax.tree.map(jnp.copy, step.state))


class Clock:
    """A clock that a test advances: by `pass_`, and by `tick` seconds each time it is read."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def take(seconds: dict[str, float]) -> Callable[..., dict[str, float]]:
    """A replacement for `medians`: it calls every contender once and reports the seconds given here."""

    def medians(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
        for call in contenders.values():
            call()
        return {name: seconds[name] for name in contenders}

    return medians


def test_medians_leave_out_the_warm_up_and_the_pauses() -> None:
    clock, order = Clock(), []
    durations = {"ours": iter([50.0, 3.0, 1.0, 9.0]), "baseline": iter([70.0, 4.0, 8.0, 6.0])}

    def contender(name: str) -> None:
        order.append(name)
        clock.pass_(next(durations[name]))

    seconds = medians(
        {"ours": lambda: contender("ours"), "baseline": lambda: contender("baseline")},
        repeats=3,
        clock=clock,
        pause=lambda: clock.pass_(100),
    )
    assert seconds == {"ours": 3.0, "baseline": 6.0}
    assert order == 4 * ["ours", "baseline"]


def test_a_stepper_continues_from_its_last_state() -> None:
    seen = []

    def add(state: jax.Array, more: int) -> tuple[jax.Array, jax.Array]:
        seen.append(int(state))
        return state + more, state

    call = stepper(add, jnp.zeros((), int), 2)
    for _ in range(3):
        call()
    assert seen == [0, 2, 4]
    assert finished(jnp.add, 1, 2)() == 3


def test_a_result_is_a_line_of_json_and_a_line_of_the_table() -> None:
    one = results.result("step", "a case", {"ours": 0.123456, "baseline": 0.5}, images_per_s=810.0372)
    other = results.result("scaling", "another case", {"ours": 2.0})
    assert json.loads(results.json_line(one)) == {
        "benchmark": "step",
        "case": "a case",
        "ours_s": 0.1235,
        "baseline_s": 0.5,
        "ratio": 4.05,
        "images_per_s": 810.0,
    }
    assert json.loads(results.json_line(other)) == {
        "benchmark": "scaling",
        "case": "another case",
        "ours_s": 2.0,
    }
    lines = results.table([one, other]).splitlines()
    assert lines[0].split() == ["benchmark", "case", "ours_s", "baseline_s", "ratio"]
    assert lines[1].split() == ["step", "a", "case", "0.1235", "0.5", "4.05", "images_per_s", "810"]
    assert lines[2].split() == ["scaling", "another", "case", "2"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--only=step,stop", "--only: found 'stop', allowed: step, clients, augment"),
        ("--only=", "--only: found '', allowed: step"),
        ("--repeats=0", "repeats"),
        ("--repeat=3", "repeat"),
        ("step", "found 'step', allowed: --only"),
    ],
)
def test_a_mistake_is_one_line(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["benchmarks", argument]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["benchmarks", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in command.MODULES:
        assert f"\n  {name} " in printed


def fake(monkeypatch: pytest.MonkeyPatch, *needs: str) -> None:
    """Register a benchmark called `fake`."""
    module = types.SimpleNamespace(
        NEEDS=needs,
        results=lambda repeats: iter([results.result("fake", "one", {"ours": float(repeats)})]),
    )
    monkeypatch.setitem(command.MODULES, "fake", "benchmarks.fake")
    monkeypatch.setitem(__import__("sys").modules, "benchmarks.fake", module)


def test_the_command_prints_lines_and_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert command.main(["benchmarks", "--only=fake,fake", "--repeats=7"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == 2 * [
        {"benchmark": "fake", "case": "one", "ours_s": 7.0}
    ]
    assert f"jax {jax.__version__}" in captured.err
    assert captured.err.splitlines()[-1].split() == ["fake", "one", "7"]


def test_a_missing_package_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake(monkeypatch, "no_such_package")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert command.main(["benchmarks", "--only=fake"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fake: found no no_such_package, allowed: pip install -e '.[bench]'" in captured.err


def test_every_benchmark_is_registered() -> None:
    for name in command.MODULES.values():
        module = importlib.import_module(name)
        assert callable(module.results)
        of_wire = {"grpc", "google", "cryptography", "flatbuffers"}
        assert set(module.NEEDS) <= (of_wire if name == "benchmarks.wire" else {"torch", "torchvision"})


def test_our_side_of_the_smaller_benchmarks_runs() -> None:
    call = clients.ours(TINY)
    call()
    call()
    evaluation.ours_features(TINY, 5)()
    query, key = augment.ours("v2", 3)()
    assert query.shape == key.shape == (3, 1, 32, 32, 3)


def test_knn_of_the_benchmark_can_succeed_and_fail() -> None:
    accuracy = evaluation.ours_knn(evaluation.features_and_labels(600, 50, 64))()
    assert 2 / evaluation.CLASSES < accuracy < 1


def test_scaling_is_per_image(compiled: settings.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has six images."""
    monkeypatch.setattr(scaling, "medians", take({"ours": 0.3}))
    monkeypatch.setattr(scaling, "held_bytes", lambda program: 12 * 2**20)
    numbers = scaling.measure(TINY, fresh(compiled), repeats=1).numbers
    assert numbers == pytest.approx({"ours_s": 0.3, "ms_per_image": 50.0, "mib_per_image": 2.0})


def test_a_donated_argument_is_counted_once() -> None:
    """On each of eight devices: 4 MiB of state, which the new state replaces, and 1 MiB in and out."""
    state, images = (jax.ShapeDtypeStruct((mib, 2**18), "float32") for mib in (4, 1))
    program = jax.jit(lambda state, images: (state + 1, 2 * images), donate_argnums=0)
    held = scaling.held_bytes(program.lower(state, images).compile())
    assert held == pytest.approx(8 * (4 + 1 + 1) * 2**20, rel=1e-4)  # and the addresses of two results


def test_memory_equals_the_compiled_programs() -> None:
    one, many = (memory.held_bytes(*sizes, num_clients=16, width=4) for sizes in ((1, 1), (4, 2)))
    for held in (one, many):
        assert held["state"] == held["clients"] + held["server"] + 4  # and the step counter
    assert many["clients"] * 8 == one["clients"]
    assert many["server"] == pytest.approx(one["server"] / 2, rel=0.01)


def test_the_work_of_the_host_is_timed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.time, "perf_counter", iter([1.0, 3.0, 3.5, 3.75]).__next__)
    numbers = host.measure(200).numbers
    assert numbers == {
        "partition_s": 2.0,
        "cohort_s": 0.5,
        "epoch_indices_s": 0.25,
        "parts_mib": 200 * 50 * 4 / 2**20,
    }


def test_limit_is_a_share_of_the_peak(compiled: settings.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "medians", take({"ours": 2.0}))
    monkeypatch.setattr(settings, "step_flops", lambda setting: 5 * 10**11)
    numbers = limit.measure(TINY, stepper(*fresh(compiled)), repeats=1, peak=1e12).numbers
    assert numbers == {"ours_s": 2.0, "gflop": 500.0, "gflop_per_s": 250.0, "share_of_peak": 0.25}


def test_the_peak_is_measured_with_one_product_by_jax_and_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Mapping[str, Callable[[], np.ndarray]]] = []
    monkeypatch.setattr(limit, "medians", lambda contenders, repeats: found.append(contenders))
    limit.products(32)
    (contenders,) = found
    assert contenders["numpy"]().shape == (32, 32)
    np.testing.assert_allclose(contenders["jax"](), contenders["numpy"](), rtol=1e-4, atol=1e-4)


def test_the_narrow_run_has_the_narrow_network() -> None:
    config = resolve(settings.narrow_run())
    model, _ = settings.build(NARROW)
    shapes = [jax.eval_shape(m.init, jax.random.key(0)) for m in (model, build_model(config, 32))]
    assert shapes[0] == shapes[1]
    assert (NARROW.clients, NARROW.batch) == (config.clients.num, config.clients.batch_size)
    assert NARROW.queue_size == config.moco.queue_size


def test_epoch_separates_the_steps_from_the_rest(toy_images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock where a round of steps takes 3 s, reading the clock 1 s, and everything else no time."""
    clock, rounds, prepare = Clock(tick=1.0), [0], settings.prepare

    def prepared(run_config: Config) -> settings.Training:
        training = prepare(run_config)

        def run_steps(*args: Any) -> Any:
            clock.pass_(3)
            rounds[0] += 1
            return training.programs.run_steps(*args)

        return training._replace(programs=training.programs._replace(run_steps=run_steps))

    monkeypatch.setattr(settings, "prepare", prepared)
    monkeypatch.setattr(epoch, "time", types.SimpleNamespace(perf_counter=clock))
    config = quickstart()
    config.data.name, config.data.dir = "npz", toy_images
    config.clients.num, config.clients.batch_size, config.clients.noniid_ratio = 4, 2, 0.5
    config.model.width, config.moco.key_dim, config.moco.queue_size = 4, 8, 20
    config.eval.knn_k = 5
    config.own.network = constant_network(make_toy_model())
    numbers = epoch.measure(config, "tiny", epochs=1).numbers
    # Two epochs of six steps, each step a round of its own; the first epoch warms up. Each round reads the
    # clock twice, the second time after 3 + 1 s, and the epoch reads it once more.
    assert rounds == [2 * 6]
    assert numbers == {
        "ours_s": 6 * 5 + 1,
        "steps_s": 6 * 4,
        "outside_share": pytest.approx(7 / 31),
        "images_per_s": pytest.approx(48 / 31),
        "checkpoint_s": 1,
        "evaluation_s": 1,
    }


def test_the_steps_over_a_network_go_on_into_the_next_epoch() -> None:
    asked: list[tuple[int, range]] = []
    programs = types.SimpleNamespace(
        feed=lambda epoch, steps: asked.append((epoch, steps)), run_steps=lambda state, pieces: (state, None)
    )
    assert len(wire._seconds(programs, None, steps_per_epoch=3, repeats=1)) == 5
    found = [(epoch, step) for epoch, steps in asked for step in steps]
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]


def test_data_measures_both_kinds_of_images(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny() -> Config:
        config = quickstart()
        config.clients.num, config.clients.batch_size = 4, 2
        config.model.width, config.moco.key_dim, config.moco.queue_size = 4, 8, 20
        config.own.network = constant_network(sparse)
        return config

    monkeypatch.setattr(settings, "narrow_run", tiny)
    monkeypatch.setattr(data, "IMAGES", 40)
    model = make_toy_model()
    # For images of 32 pixels.
    sparse = model._replace(client=lambda params, images: model.client(params, images[..., ::8, ::8, :]))
    monkeypatch.setattr(data, "time", types.SimpleNamespace(perf_counter=Clock(tick=1.0)))
    data.write_npy(tmp_path)
    # Five steps, each a round of its own. Each round waits for its images and for their end: two readings of
    # a clock where a reading takes 1 s, and 1 s of waiting. The epoch reads the clock once more.
    for resident in (True, False):
        epochs = list(data.make_epochs("npy", tmp_path, resident, 2))
        assert epochs == 2 * [data.Epoch(seconds=2 * 10 + 1, waiting=10)]


def test_data_compares_medians_without_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def make_epochs(name: str, folder: pathlib.Path, resident: bool, count: int) -> Iterator[data.Epoch]:
        assert (name, count) == ("npy", 4)
        times = ((50, 40), (3, 1), (2, 1), (4, 1)) if resident else ((70, 0), (5, 2), (9, 3), (4, 3))
        return iter([data.Epoch(*pair) for pair in times])

    monkeypatch.setattr(data, "make_epochs", make_epochs)
    numbers = data.measure("tiny", "npy", lambda folder: None, repeats=3).numbers
    assert numbers == {
        "ours_s": 5,
        "baseline_s": 3,
        "ratio": 0.6,
        "waiting_share": pytest.approx(0.4),
        "baseline_waiting_share": pytest.approx(1 / 3),
        "images_per_s": 400,
    }
