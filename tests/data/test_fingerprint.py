"""A data set is recognised in any location and format, and any change to it is noticed."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mocosfl_jax.data import in_memory, load
from mocosfl_jax.data.fingerprint import Fingerprint, changes, fingerprint
from mocosfl_jax.data.images import OnDisk
from tests.support.data_files import small

Arrays = Any  # name -> array, as accepted by np.savez


def write_npy(folder: pathlib.Path, arrays: Arrays) -> pathlib.Path:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def test_a_copy_has_the_same_fingerprint(tmp_path: pathlib.Path) -> None:
    folders = [write_npy(tmp_path / name, small()) for name in ("one", "other")]
    one, other = (load("npy", str(folder), None) for folder in folders)
    assert changes(fingerprint(one), fingerprint(other)) == []


def swap_two_images(arrays: Arrays) -> None:
    arrays["x_train"][[0, 1]] = arrays["x_train"][[1, 0]]


def flip_a_bit(arrays: Arrays) -> None:
    arrays["x_test"][-1, -1, -1, -1] ^= 1


def swap_two_labels(arrays: Arrays) -> None:
    first = arrays["y_train"][0]
    other = int(np.flatnonzero(arrays["y_train"] != first)[0])
    arrays["y_train"][[0, other]] = arrays["y_train"][[other, 0]]


def add_an_image(arrays: Arrays) -> None:
    arrays["x_train"] = np.concatenate([arrays["x_train"], arrays["x_train"][:1]])
    arrays["y_train"] = np.concatenate([arrays["y_train"], arrays["y_train"][:1]])


@pytest.mark.parametrize(
    "change, words",
    [
        (swap_two_images, ["other pixels"]),
        (flip_a_bit, ["other pixels"]),
        (swap_two_labels, ["other labels"]),
        (add_an_image, ["training images: {} there, {} now", "other labels", "other pixels"]),
    ],
)
def test_a_change_is_named(
    tmp_path: pathlib.Path, change: Callable[[Arrays], None], words: list[str]
) -> None:
    before, after = small(), {name: array.copy() for name, array in small().items()}
    change(after)
    prints = []
    for name, arrays in (("before", before), ("after", after)):
        np.savez_compressed(str(tmp_path / f"{name}.npz"), **dict[str, Any](arrays))
        prints.append(fingerprint(load("npz", str(tmp_path / f"{name}.npz"), None)))
    count = len(before["x_train"])
    assert changes(*prints) == [line.format(count, count + 1) for line in words]
    assert changes(prints[0], prints[0]) == []


def test_images_on_disk_are_not_all_read(tmp_path: pathlib.Path) -> None:
    """Reads 64 images of each split, evenly spaced from first to last; in memory the fingerprint differs."""
    x = np.random.default_rng(0).integers(0, 256, (1000, 4, 4, 3)).astype(np.uint8)
    y = np.arange(1000) % 3
    folder = write_npy(tmp_path / "set", {"x_train": x, "y_train": y, "x_test": x[:9], "y_test": y[:9]})
    dataset = load("npy", str(folder), None)
    images = dataset.x_train
    assert isinstance(images, OnDisk)
    read: list[int] = []

    def reading(rows: np.ndarray) -> np.ndarray:
        read.extend(rows.tolist())
        return images.read(rows)

    recording = OnDisk(images.shape, reading, images.load)
    found = fingerprint(dataset._replace(x_train=recording))
    assert len(read) == 64 and (min(read), max(read)) == (0, 999)
    assert found == fingerprint(dataset)
    assert found["labels"] == fingerprint(in_memory(dataset))["labels"]


def test_the_same_arrays_are_the_same_data_compressed_or_not(tmp_path: pathlib.Path) -> None:
    """Compressed, all 200 images count, and else 64, which are compared where one set is not compressed."""
    x = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 3)).astype(np.uint8)
    y = np.arange(200) % 3
    sampled = np.linspace(0, 199, 64).astype(int)
    found: dict[str, list[Fingerprint]] = {"npz": [], "compressed": []}
    for change in (None, int(np.setdiff1d(np.arange(200), sampled)[0]), int(sampled[7])):
        images = x.copy()
        if change is not None:
            images[change] ^= 1
        arrays: Any = {"x_train": images, "y_train": y, "x_test": x[:9], "y_test": y[:9]}
        for kind, save in (("npz", np.savez), ("compressed", np.savez_compressed)):
            save(tmp_path / f"{kind}{change}.npz", **arrays)
            found[kind].append(fingerprint(load("npz", str(tmp_path / f"{kind}{change}.npz"), None)))
    other = ["other pixels"]
    plain, compressed = found["npz"], found["compressed"]
    assert changes(plain[0], compressed[0]) == changes(compressed[0], plain[0]) == []
    assert changes(plain[0], compressed[2]) == changes(compressed[0], plain[2]) == other
    assert changes(compressed[0], compressed[1]) == changes(plain[0], plain[2]) == other
    assert changes(plain[0], plain[1]) == changes(plain[0], compressed[1]) == []  # not in the sample

    earlier = [
        {name: value for name, value in each.items() if name != "sampled_pixels"}
        for each in (plain[0], compressed[0])
    ]
    for now, same in (
        (plain[0], [True, False]),
        (compressed[0], [True, True]),
        (compressed[2], [False, False]),
    ):
        assert [changes(before, now) == [] for before in earlier] == same
    source = [{f"source_{name}": value for name, value in each.items()} for each in (plain[0], compressed[0])]
    assert changes(*source) == []
    assert changes(source[0], {f"source_{name}": value for name, value in plain[2].items()}) == [
        "other source pixels"
    ]


def test_names_that_are_not_utf8_count(tmp_path: pathlib.Path) -> None:
    """Surrogates stand for bytes of a folder's name, or come from an array."""
    dataset = load("npy", str(write_npy(tmp_path / "set", small())), None)
    names = (("a", "b", "c", "\udcff"), ("a", "b", "c", "\udcfe"), ("a", "b", "c", "\ud800"))
    found = [fingerprint(dataset._replace(class_names=each))["class_names"] for each in names]
    assert len(set(found)) == 3
