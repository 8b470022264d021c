"""A smaller CIFAR-10 in one file."""

import pathlib

import numpy as np
import pytest

from scripts import subset
from tests.support import data_files


def test_the_first_images_of_each_class_are_taken(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_files.shrink("cifar10", monkeypatch)
    written = data_files.written("cifar10")
    binary = data_files.files("cifar10", "binary", written)
    data_files.unpack(tmp_path / "data" / "cifar-10-batches-bin", binary)
    out = tmp_path / "new" / "few.npz"
    assert subset.main([f"--data_dir={tmp_path / 'data'}", "--train=2", f"--out={out}"]) == 0
    rows: list[int] = []
    for row, label in enumerate(written["y_train"]):
        if sum(written["y_train"][taken] == label for taken in rows) < 2:
            rows.append(row)
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["x_train"], written["x_train"][rows])
        np.testing.assert_array_equal(arrays["y_train"], written["y_train"][rows])
        np.testing.assert_array_equal(arrays["x_test"], written["x_test"])

    subset.write(subset.cifar10(str(tmp_path / "data")), out, classes=[7, 2], train=1, test=1)
    with np.load(out) as arrays:
        first = [np.flatnonzero(written["y_test"] == label)[0] for label in (2, 7)]
        np.testing.assert_array_equal(arrays["x_test"], written["x_test"][sorted(first)])
        names = arrays["class_names"][arrays["y_test"]]
        np.testing.assert_array_equal(names, [f"class{n}" for n in written["y_test"][sorted(first)]])


def test_a_folder_without_the_data_set_is_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    assert subset.main([f"--data_dir={tmp_path}", f"--out={tmp_path / 'few.npz'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
