"""Streamed and resident images are the same, and so are the runs that use them."""

import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from PIL import Image

from mocosfl_jax.config import Clients, Config, Data, Eval, Moco, Model, Synchronization
from mocosfl_jax.data.images import OnDisk
from mocosfl_jax.errors import UserError
from mocosfl_jax.feed import batches
from mocosfl_jax.training import checkpoint, loop, programs, workdir
from mocosfl_jax.training.experiment import Run
from mocosfl_jax.training.journal import Output
from tests.support.toy import IMAGE, make_toy_model
from tests.support.training import comparable, prepare, train

S, M, B, R, EPOCHS = 7, 2, 3, 3, 4


def indices(epoch: int) -> np.ndarray:
    return np.random.default_rng(epoch).integers(0, 20, (S, M, B)).astype(np.int32)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_both_feeds_give_the_images_of_the_indices(size: int) -> None:
    """From the start, from the middle of an epoch, and after skipped epochs."""
    images = np.random.default_rng(1).integers(0, 256, (20, *IMAGE), np.uint8)
    place = SingleDeviceSharding(jax.devices()[0])
    feeds = (
        batches.resident(jax.device_put(images), indices, size, place),
        batches.streamed(images, indices, size, place, epochs=EPOCHS, steps_per_epoch=S, steps_per_round=R),
    )
    for epoch, first in ((1, 3), (1, 6), (2, 0), (2, 3), (0, 0), (3, 6)):
        steps = range(first, min(first + R, S))
        for feed in feeds:
            pieces = [np.asarray(piece) for piece in feed(epoch, steps)]
            np.testing.assert_array_equal(np.concatenate(pieces), images[indices(epoch)[first : steps.stop]])
            assert {len(piece) for piece in pieces} <= {1, size}


def test_a_run_that_goes_on_within_a_round_needs_all_images_on_the_device() -> None:
    """As on other data, whose rounds have another length."""
    images = np.zeros((20, *IMAGE), np.uint8)
    place = SingleDeviceSharding(jax.devices()[0])
    feed = batches.streamed(images, indices, 3, place, epochs=1, steps_per_epoch=S, steps_per_round=R)
    for steps in (range(2, 5), range(6, 9)):  # a start that is none, and one of a piece of another length
        with pytest.raises(UserError, match=r"config\.data\.resident: found False and a run that goes on"):
            next(iter(feed(0, steps)))


def test_the_next_images_are_loaded_while_the_device_works() -> None:
    """They are loaded before they are requested, also across the end of an epoch; but not all of them."""
    loaded: set[int] = set()
    following = threading.Event()

    def read(rows: np.ndarray) -> np.ndarray:
        loaded.update(rows.tolist())
        if len(loaded) >= 3:
            following.set()
        return np.zeros((len(rows), 1024, 1024, 3), np.uint8)

    images = OnDisk((500, 1024, 1024, 3), read, lambda: read(np.arange(500)))

    def one_by_one(epoch: int) -> np.ndarray:
        return np.array([epoch], np.int32).reshape(1, 1, 1)

    place = SingleDeviceSharding(jax.devices()[0])
    feed = batches.streamed(images, one_by_one, 1, place, epochs=500, steps_per_epoch=1, steps_per_round=1)
    next(feed(0, range(1)))
    assert following.wait(20)
    assert len(loaded) <= 1 + 2 * batches._THREADS


def test_a_small_data_set_is_resident() -> None:
    limit, cpu, accelerator = batches.RESIDENT_BYTES_ON_CPU, None, 2**34
    assert batches.residence(None, limit, cpu) == (
        True,
        "at most 2 GiB, the limit for a device that does not report its memory",
    )
    assert not batches.residence(None, limit + 1, cpu).resident
    assert batches.residence(True, limit + 1, cpu) == (True, "config.data.resident is True")
    assert not batches.residence(False, 1, cpu).resident
    assert not batches.residence(None, limit // 2, cpu, copies=4).resident  # each device has a copy
    assert batches.residence(None, limit // 4, cpu, copies=4).why.endswith("memory, of which there are 4")
    assert batches.residence(None, 2**32, accelerator, copies=4).resident  # each in its own memory
    assert batches.residence(None, 2**32, accelerator) == (True, "at most 4 GiB, 25% of the device's memory")
    assert batches.residence(None, 2**32 + 1, accelerator) == (
        False,
        "more than 4 GiB, 25% of the device's memory",
    )


def test_a_scanned_chunk_has_a_bounded_size() -> None:
    assert batches.steps_per_piece(3072 * 100, 50) == 50
    assert batches.steps_per_piece(224 * 224 * 3 * 100, 50) == 4
    assert batches.steps_per_piece(2**30, 50) == 1


def write_images(folder: pathlib.Path, kind: str, shape: tuple[int, ...] = IMAGE) -> None:
    """Write the same 60 pictures as npz, as npy files or as an image folder."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 20)
    pictures = rng.integers(0, 256, (60, *shape)).astype(np.uint8)
    arrays: dict[str, Any] = {
        "x_train": pictures,
        "y_train": labels,
        "x_test": pictures[::3],
        "y_test": labels[::3],
    }
    folder.mkdir()
    if kind == "npz":
        np.savez(folder / "images.npz", **arrays)
    elif kind == "npy":
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
    else:
        for split in ("train", "test"):
            for i, (picture, label) in enumerate(
                zip(arrays[f"x_{split}"], arrays[f"y_{split}"], strict=True)
            ):
                place = folder / split / str(label)
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(place / f"{i:03}.png")


def prepared(folder: pathlib.Path, kind: str, resident: bool, image_size: int | None = None) -> Run:
    return prepare(
        Config(
            epochs=2,
            data=Data(name=kind, dir=str(folder), resident=resident, image_size=image_size),
            clients=Clients(num=6, cohort=5, batch_size=2, noniid_ratio=1.0),
            sync=Synchronization(frequency=2),
            model=Model(width=4),
            moco=Moco(key_dim=8, queue_size=20),
            eval=Eval(every=0, knn_k=3, probe_epochs=1),
        ),
        model=make_toy_model(),
    )


def last_state(run: Run, folder: pathlib.Path) -> list[np.ndarray]:
    like = jax.jit(run.algorithm.init)(jax.random.key(0))
    with checkpoint.open_manager(folder / "checkpoints", keep=3) as manager:
        restored = checkpoint.restore_newest(manager, like, run.algorithm.homes)
    assert restored is not None and restored[1].step == run.total_steps
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored[0])]


def test_a_streamed_run_equals_the_resident_run_bit_for_bit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the run stops within an epoch and resumes."""
    for kind in ("npz", "image_folder"):
        write_images(tmp_path / kind, kind)
    resident = prepared(tmp_path / "npz", "npz", True)
    assert isinstance(resident.dataset.x_train, np.ndarray)
    assert train(resident, tmp_path / "resident")

    streamed = prepared(tmp_path / "image_folder", "image_folder", False)
    assert isinstance(streamed.dataset.x_train, OnDisk)
    stop, make_feed = threading.Event(), programs.make_feed
    messages: list[str] = []

    def make_stopping_feed(run: Run, size: int) -> batches.Feed:
        feed = make_feed(run, size)

        def stopping_feed(epoch: int, steps: range) -> Iterator[jax.Array]:
            if epoch == 1 and steps.start == run.steps_per_round:
                stop.set()
            return feed(epoch, steps)

        return stopping_feed

    with monkeypatch.context() as patch:
        patch.setattr(programs, "make_feed", make_stopping_feed)
        workdir.claim(tmp_path / "streamed", streamed.config, {})
        output = Output(tmp_path / "streamed", messages.append, lambda metrics: None)
        assert not loop.train(streamed, stop.is_set, output).finished
    stopped = streamed.steps_per_epoch + 2 * streamed.steps_per_round
    assert messages[-1] == f"saved at step {stopped} of {streamed.total_steps}"
    assert "streamed from the host: 2.812 KiB; config.data.resident is False" in messages[0]
    assert train(streamed, tmp_path / "streamed")
    assert comparable(tmp_path / "streamed") == comparable(tmp_path / "resident")
    ends = last_state(streamed, tmp_path / "streamed"), last_state(resident, tmp_path / "resident")
    for ours, theirs in zip(*ends, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_views_of_resized_images_are_cropped_from_the_whole_ones(tmp_path: pathlib.Path) -> None:
    """Resident, or streamed from files: the same run bit for bit."""
    ends = {}
    for kind, resident in (("npz", True), ("image_folder", False)):
        write_images(tmp_path / kind, kind, (9, 7, 3))
        run = prepared(tmp_path / kind, kind, resident, image_size=IMAGE[0])
        assert run.dataset.x_train.shape[1:] == IMAGE and run.views.shape[1:] == (9, 8, 3)
        assert train(run, tmp_path / "run" / kind)
        ends[kind] = comparable(tmp_path / "run" / kind)
    assert ends["npz"] == ends["image_folder"]
