"""Loss-based communication saving: when it saves, what it keeps, and resuming after a stop at any moment."""

import copy
import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.algorithm.messages import SmashedData
from mocosfl_jax.config import Clients, Config, Data, Eval, Moco, Model, Saving, Synchronization, quickstart
from mocosfl_jax.errors import UserError
from mocosfl_jax.training import checkpoint, experiment, saving, workdir
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.saving import Traffic
from tests.support.toy import IMAGE, make_toy_model
from tests.support.training import comparable, prepare, train

EPOCHS = 7


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, "float32")


@pytest.mark.parametrize(
    "losses, states",
    [
        # Threshold 1, warm-up of two epochs: falls of 1 or more keep clients training.
        ([9, 9, 9, 9, 9, 9], "AAABCC"),
        ([9, 8, 7, 6, 5, 4], "AAAAAA"),
        ([9, 9, 8.5, 8.2, 7.0, 7.0], "AAABCA"),
        ([9, 9, 10, 11, 9.5, 9.4], "AAABCA"),
    ],
)
def test_states_follow_the_loss(losses: list[float], states: str) -> None:
    """The states of epochs 1, 2, ..., each decided by the previous epoch."""
    traffic, last, seen = Traffic.BOTH_WAYS, math.inf, []
    for epoch, loss in enumerate(losses, start=1):
        seen.append(str(traffic))
        traffic = saving.next_traffic(traffic, loss, last, epoch=epoch, threshold=1.0, warmup_epochs=2)
        last = loss
    assert "".join(seen) == states


def test_without_a_threshold_everything_is_always_sent() -> None:
    for loss in (1.0, 2.0, math.inf):
        after = saving.next_traffic(Traffic.BOTH_WAYS, loss, 1.0, epoch=50, threshold=0.0, warmup_epochs=0)
        assert after is Traffic.BOTH_WAYS


def test_store_returns_what_was_kept(tmp_path: pathlib.Path) -> None:
    store = saving.Store(tmp_path, floats(3, 2, 4, 2, 2, 1))
    rng = np.random.default_rng(0)
    kept = [SmashedData(*jnp.asarray(rng.normal(size=(2, 4, 2, 2, 1)), jnp.float32)) for _ in range(3)]
    for step in (2, 0, 1):
        store.write(5, step, kept[step])
    for step in range(3):
        for a, b in zip(store.read(5, step), kept[step], strict=True):
            np.testing.assert_array_equal(a, b)
    other = saving.Store(tmp_path, floats(4, 2, 4, 2, 2, 1))
    with pytest.raises(UserError, match=r"replay_5.npy: found \(3, 2, 4, 2, 2, 1\), allowed: "):
        other.read(5, 0)


def test_store_keeps_bfloat16_bit_for_bit_in_half_the_bytes(tmp_path: pathlib.Path) -> None:
    arrays = jax.ShapeDtypeStruct((2, 2, 512), jnp.bfloat16)
    store = saving.Store(tmp_path, arrays)
    kept = SmashedData(*jax.random.normal(jax.random.key(0), (2, 512), jnp.bfloat16))
    store.write(0, 1, kept)
    for found, sent in zip(store.read(0, 1), kept, strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, sent)
    checksums = 2 * 4
    header = store.path(0).stat().st_size - saving.gibibytes(arrays) * 2**30 - checksums
    assert saving.gibibytes(arrays) * 2**30 == 2 * 2 * 512 * 2 and 0 < header <= 128
    with pytest.raises(UserError, match=r"replay_0.npy: found \|V2, allowed: float32, that of the run's"):
        saving.Store(tmp_path, floats(*arrays.shape)).read(0, 1)


def test_a_damaged_file_is_not_replayed(tmp_path: pathlib.Path) -> None:
    store = saving.Store(tmp_path, floats(3, 2, 50))
    rng = np.random.default_rng(0)
    for step in (0, 1):
        store.write(4, step, SmashedData(*jnp.asarray(rng.normal(size=(2, 50)), jnp.float32)))
    path = store.path(4)
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"replay_4\.npy: damaged, the smashed data of step 2 are not those"):
        store.read(4, 2)  # never written
    start = len(whole) - 3 * 2 * 50 * 4 - 3 * 4
    for bit in rng.integers(0, 8 * 2 * 50 * 4, 20):
        flipped = bytearray(whole)
        flipped[start + bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(flipped)
        store.read(4, 1)
        with pytest.raises(UserError, match=r"damaged, the smashed data of step 0 are not those"):
            store.read(4, 0)
    for damaged in (whole[:-1], whole[:-12], whole[:900], whole[:50], b"", whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"replay_4\.npy: damaged") as error:
            store.read(4, 0)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    store.read(4, 0)


def test_epochs_are_not_confused(tmp_path: pathlib.Path) -> None:
    store = saving.Store(tmp_path, floats(1, 2, 1))
    store.write(3, 0, SmashedData(jnp.ones(1), jnp.ones(1)))
    store.write(7, 0, SmashedData(jnp.zeros(1), jnp.zeros(1)))
    assert [path.name for path in tmp_path.iterdir()] == ["replay_7.npy"]
    with pytest.raises(UserError, match=r"replay_3\.npy: this file is missing, but the run stopped"):
        store.read(3, 0)


def test_a_store_beyond_its_budget_is_refused(tmp_path: pathlib.Path) -> None:
    config = quickstart()
    config.saving = Saving(loss_threshold=1.0, replay_gib=0.1)
    # 60 steps of 2 x 100 x 32 x 32 x 8 floats.
    with pytest.raises(UserError, match=r"config\.saving\.replay_gib: found 0.1, allowed: 0.366 or more"):
        prepare(config)
    saving.Store(tmp_path, floats(1024, 2, 1024, 16, 16, 1)).require_space()
    with pytest.raises(UserError, match=r"found .* GiB free, 2.15e\+09 GiB are needed"):
        saving.Store(tmp_path, floats(2**29, 2, 2**29)).require_space()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Cohorts of two with a queue per client; no loss ever falls enough: A, A, B, C, C, ..."""

    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (24, *IMAGE)).astype(np.uint8), np.arange(24) % 3
    np.savez(path, x_train=pictures, y_train=labels, x_test=pictures[:9], y_test=labels[:9])
    return prepare(
        Config(
            epochs=EPOCHS,
            data=Data(name="npz", dir=str(path)),
            clients=Clients(num=3, cohort=2, batch_size=2, noniid_ratio=1.0),
            sync=Synchronization(frequency=2),
            saving=Saving(loss_threshold=1e6, warmup_epochs=1),
            model=Model(width=4),
            moco=Moco(key_dim=8, queue_size=24, feature_sharing=False),
            eval=Eval(every=2, knn_k=3, probe_epochs=2),
        ),
        model=make_toy_model(),
    )


@pytest.fixture(scope="module")
def undisturbed(run: Run, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(run, folder)
    return folder


def test_data_are_sent_both_ways_then_up_then_not_at_all(run: Run, undisturbed: pathlib.Path) -> None:
    lines = [m for m in workdir.read_metrics(undisturbed) if "smashed_up_bytes" in m]
    # 4 images of 4 x 4 x 5 floats per step.
    one_way = 4 * 4 * 4 * 5 * 4 * run.steps_per_epoch
    sent = [(m["smashed_up_bytes"], m["smashed_down_bytes"]) for m in lines]
    assert sent == [(2 * one_way, one_way)] * 2 + [(2 * one_way, 0)] + [(0, 0)] * (EPOCHS - 3)
    assert [("divergence" in m) for m in lines] == [True, True] + [False] * (EPOCHS - 2)


def test_frozen_clients_receive_nothing(run: Run, tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(
        run.config, epochs=1, optim=dataclasses.replace(run.config.optim, client_lr=0)
    )
    frozen = experiment.prepare(config, run.mesh, model=make_toy_model())
    assert train(frozen, tmp_path)
    line = next(m for m in workdir.read_metrics(tmp_path) if "smashed_up_bytes" in m)
    assert line["smashed_up_bytes"] > 0 and line["smashed_down_bytes"] == 0


def test_clients_pause_and_the_server_continues(run: Run, tmp_path: pathlib.Path) -> None:
    """From the end of epoch 2 on, no client-side model changes, but the server's does."""
    assert not train(run, tmp_path, lambda m: m["epoch"] == 2)
    like = jax.jit(run.algorithm.init)(jax.random.key(0))
    states = []
    for _ in range(2):
        with checkpoint.open_manager(tmp_path / "checkpoints", keep=3) as manager:
            restored = checkpoint.restore_newest(manager, like, run.algorithm.homes)
        assert restored is not None
        states.append(restored[0])
        if len(states) == 1:
            assert train(run, tmp_path)
    before, after = states
    before_params, after_params = before.pool.shared.params, after.pool.shared.params
    for a, b in zip(jax.tree.leaves(before_params), jax.tree.leaves(after_params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(before.server.params["kernel"] != after.server.params["kernel"])
    assert np.any(before.pool.own.queue.keys != after.pool.own.queue.keys)


@pytest.mark.parametrize("epoch", [2, 3, 5])
def test_a_stopped_run_resumes_as_if_uninterrupted(
    run: Run, undisturbed: pathlib.Path, tmp_path: pathlib.Path, epoch: int
) -> None:
    """Stopped before the epoch that keeps smashed data, before the first replay, and between two replays."""
    assert not train(run, tmp_path, lambda m: m["epoch"] == epoch)
    assert train(run, tmp_path)
    assert comparable(tmp_path) == comparable(undisturbed)


def test_a_missing_file_is_reported(run: Run, tmp_path: pathlib.Path) -> None:
    assert not train(run, tmp_path, lambda m: m["epoch"] == 4)
    (tmp_path / "replay_2.npy").unlink()
    with pytest.raises(UserError, match=r"replay_2\.npy: this file is missing, but the run stopped"):
        train(run, tmp_path)


def test_smashed_data_of_a_checkpoint_are_kept_until_the_next_checkpoint(
    run: Run, tmp_path: pathlib.Path
) -> None:
    """Even if checkpoints are rare, there is one at the start of the epoch whose smashed data are kept."""
    config = copy.deepcopy(run.config)
    config.checkpoint.every = 100
    assert train(run._replace(config=config), tmp_path)
    with checkpoint.open_manager(tmp_path / "checkpoints", keep=3) as manager:
        assert 2 * run.steps_per_epoch in manager.all_steps()
