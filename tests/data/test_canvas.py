"""Whole pictures are at hand for crops where the images of a data set were resized."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.data import canvas, decode, images, load
from mocosfl_jax.errors import UserError
from tests.support.data_files import small, write_folder


def sides(painted: np.ndarray) -> list[int]:
    """Height and width that a canvas records."""
    return [int.from_bytes(bytes(pixel.tolist()), "big") for pixel in painted[-1, :2]]


@pytest.mark.parametrize("height, width", [(6, 16), (16, 16), (3, 7), (40, 16), (3, 70_000)])
def test_a_canvas_holds_the_picture_and_its_size(height: int, width: int) -> None:
    ramp = np.arange(height * width).reshape(height, width, 1) * [1, 2, 3]
    picture = Image.fromarray((ramp % 251).astype(np.uint8))
    painted = canvas.paint(picture, 8)
    assert painted.shape == canvas.shape(8) == (17, 16, 3) and painted.dtype == np.uint8
    assert sides(painted) == [height, width]
    rows, columns = min(height, 16), min(width, 16)
    expected = picture.resize((columns, rows), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(painted[:rows, :columns], np.asarray(expected))
    assert not painted[rows:-1].any() and not painted[:-1, columns:].any()


def test_a_folder_has_canvases_only_where_it_is_resized(tmp_path: pathlib.Path) -> None:
    data = small()
    write_folder(tmp_path, data)
    assert load("image_folder", str(tmp_path), None).whole is None
    wide = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    files = sorted((tmp_path / "train").glob("*/*.png"))
    Image.fromarray(wide).save(files[3])
    dataset = load("image_folder", str(tmp_path), 16)
    assert dataset.whole is not None and dataset.whole.shape == (12, *canvas.shape(16))
    third, fourth = dataset.whole[2:4]
    np.testing.assert_array_equal(third[:8, :8], np.asarray(Image.open(files[2])))
    np.testing.assert_array_equal(fourth[:12, :20], wide)
    assert sides(third) == [8, 8] and sides(fourth) == [12, 20]
    np.testing.assert_array_equal(images.in_memory(dataset.whole)[2:4], dataset.whole[2:4])


def test_a_broken_picture_is_an_empty_canvas_and_counts_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(decode.logging, "warning", lambda text, *args: said.append(text % args))
    write_folder(tmp_path, small())
    files = sorted((tmp_path / "train").glob("*/*.png"))
    files[5].write_bytes(b"")
    dataset = load("image_folder", str(tmp_path), 16, 0.1)
    assert dataset.whole is not None and not dataset.whole[[5]].any()
    assert len(said) == 1
    files[6].write_bytes(b"")
    with pytest.raises(UserError, match="2 of 12 images are not readable"):
        images.in_memory(dataset.whole)


@pytest.mark.parametrize("write", ["npz", "npy"])
def test_arrays_that_are_resized_have_canvases(write: str, tmp_path: pathlib.Path) -> None:
    data = small()
    np.savez(tmp_path / "a.npz", **data)  # type: ignore[arg-type]
    for name, array in data.items():
        np.save(tmp_path / f"{name}.npy", array)
    assert load(write, str(tmp_path), 8).whole is None
    whole = load(write, str(tmp_path), 6).whole
    assert whole is not None
    np.testing.assert_array_equal(whole[:][:, :8, :8], data["x_train"])
    assert sides(whole[[4]][0]) == [8, 8]
    np.testing.assert_array_equal(images.in_memory(whole), whole[:])
