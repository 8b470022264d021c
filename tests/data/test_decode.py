"""Pictures are decoded as a viewer shows them: upright, and on white where they are transparent."""

import io
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mocosfl_jax.data import decode, images, in_memory, load
from tests.support.data_files import small, tiny_files, write_folder, zip_tree

ORIENTATION = 0x0112
# The letter F, brighter at its top left, in a picture that is wider than high.
LETTER = np.zeros((16, 24, 3), np.uint8)
LETTER[2:14, 4:7] = LETTER[2:5, 4:20] = LETTER[7:10, 4:14] = 200
LETTER[2:5, 4:7] = 255
# How each orientation stores what is to be seen, as the EXIF standard says where row 0 and column 0 are.
STORED = {
    1: LETTER,
    2: LETTER[:, ::-1],
    3: LETTER[::-1, ::-1],
    4: LETTER[::-1],
    5: LETTER.transpose(1, 0, 2),
    6: LETTER.transpose(1, 0, 2)[::-1],
    7: LETTER.transpose(1, 0, 2)[::-1, ::-1],
    8: LETTER.transpose(1, 0, 2)[:, ::-1],
}


def write(path: pathlib.Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(
        path, exif=exif, quality=100, subsampling=0, lossless=True
    )


def is_the_letter(picture: np.ndarray) -> bool:
    return picture.shape == LETTER.shape and np.abs(picture.astype(int) - LETTER).max() < 12


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_a_picture_stands_upright(suffix: str, tmp_path: pathlib.Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for orientation in STORED:
            path = tmp_path / split / "a" / f"{orientation}{suffix}"
            write(path, orientation)
            with Image.open(path) as image:  # the picture is as Pillow shows it, too
                assert is_the_letter(np.asarray(ImageOps.exif_transpose(image)))
    lazy = load("image_folder", str(tmp_path), None)
    whole = in_memory(lazy)
    square = np.asarray(images.fit(Image.fromarray(LETTER), 16))
    for number in range(8):
        assert is_the_letter(lazy.x_train[[number]][0])  # streamed
        assert is_the_letter(whole.x_train[number])  # resident
        encoded = decode.read(tmp_path / "test" / "a" / f"{number + 1}{suffix}", 16)  # by `encode`
        assert np.abs(np.asarray(encoded, int) - square).max() < 12


@pytest.mark.parametrize("value", [0, 9, 700])
def test_an_orientation_that_does_not_exist_is_ignored(value: int, tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    Image.fromarray(LETTER).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_pixels(tmp_path / "a.png")), LETTER)


def open_pixels(path: pathlib.Path) -> Image.Image:
    return decode.pixels(lambda: path.open("rb"), None)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("block", [b"", b"x", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"])
def test_a_broken_exif_block_does_not_lose_the_picture(block: bytes, tmp_path: pathlib.Path) -> None:
    Image.fromarray(LETTER).save(tmp_path / "a.jpg", exif=block, quality=100, subsampling=0)
    assert is_the_letter(np.asarray(open_pixels(tmp_path / "a.jpg")))


def composited(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def test_transparent_pixels_are_white_and_hide_their_colours(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (16, 16, 3), np.uint8)
    alpha = rng.choice(np.array([0, 1, 100, 254, 255], np.uint8), (16, 16))
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    gray = Image.fromarray(colour[..., 0])
    keyed = Image.fromarray(np.where(alpha[..., None] < 100, 7, colour // 2 + 100).astype(np.uint8))
    palette = Image.fromarray((np.arange(256).reshape(16, 16) % 4).astype(np.uint8), "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    of_palette = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [9, 9, 9]])[np.asarray(palette)]
    see_through = np.array([255, 0, 128, 255])[np.asarray(palette)]
    cases: dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]] = {
        "rgba.png": (rgba, {}, composited(colour, alpha)),
        "rgba.tif": (rgba, {}, composited(colour, alpha)),
        "rgba.webp": (rgba, {"lossless": True, "exact": True}, composited(colour, alpha)),
        "la.png": (
            Image.merge("LA", (gray, Image.fromarray(alpha))),
            {},
            composited(np.repeat(colour[..., :1], 3, 2), alpha),
        ),
        "p.png": (palette, {"transparency": bytes([255, 0, 128, 255])}, composited(of_palette, see_through)),
        "p.gif": (palette, {"transparency": 1}, composited(of_palette, (np.asarray(palette) != 1) * 255)),
        "rgb.png": (
            keyed,
            {"transparency": (7, 7, 7)},
            composited(np.asarray(keyed), (alpha >= 100) * 255),
        ),
    }
    for name, (image, options, expected) in cases.items():
        image.save(tmp_path / name, **options)
        found = np.asarray(open_pixels(tmp_path / name))
        assert found.dtype == np.uint8
        np.testing.assert_allclose(found, expected, atol=1, err_msg=name)


def test_tiny_imagenet_and_folders_decode_alike(tmp_path: pathlib.Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    _, contents = tiny_files()
    name = min(file for file in contents if file.startswith("train/n01443537/images/"))
    stored = Image.open(io.BytesIO(contents[name]))
    turned = io.BytesIO()
    stored.save(turned, "PNG", exif=exif)
    contents[name] = turned.getvalue()
    zip_tree(tmp_path / "tiny-imagenet-200.zip", contents)
    first = load("tiny_imagenet", str(tmp_path), None).x_train[[0]][0]
    np.testing.assert_array_equal(first, np.rot90(np.asarray(stored), -1))

    write_folder(tmp_path / "set", small())
    path = min((tmp_path / "set" / "train" / "class0").iterdir())
    path.write_bytes(turned.getvalue())
    np.testing.assert_array_equal(load("image_folder", str(tmp_path / "set"), None).x_train[[0]][0], first)
