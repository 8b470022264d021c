"""Every picture of a folder is found, wherever it lies; all else is counted by reason and named."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.data import find, in_memory, load
from mocosfl_jax.errors import UserError

HALVES = np.zeros((8, 8, 3), np.uint8)  # upper half red, lower half black
HALVES[:4] = (200, 40, 40)


def save(path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(HALVES).save(path)


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    """A picture of each class in each split."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / "set" / split / name / "0.png")
    return tmp_path / "set"


def names(paths: list[pathlib.Path], folder: pathlib.Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def reasons(found: find.Found, folder: pathlib.Path) -> dict[str, str]:
    return {os.path.relpath(path, folder): reason for path, reason in found.unused}


@pytest.mark.parametrize("suffix", [*find.SUFFIXES, ".JPG", ".Tiff"])
def test_every_suffix_is_read(suffix: str, root: pathlib.Path) -> None:
    lossy = suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
    gray = {".pgm": "L", ".pbm": "1"}.get(suffix)
    Image.fromarray(HALVES).convert(gray or "RGB").save(
        root / "train" / "a" / f"1{suffix}", format="JPEG" if suffix in (".jfif", ".jpe") else None
    )
    dataset = in_memory(load("image_folder", str(root), None))
    assert dataset.y_train.tolist() == [0, 0, 1] and dataset.unused == ()
    found = dataset.x_train[1].astype(int)
    if gray:
        assert (found[..., :1] == found).all() and found[:4].any() and not found[4:].any()
    else:
        assert np.abs(found - HALVES)[[0, -1]].max() <= (40 if lossy else 0)


def test_the_first_frame_counts(root: pathlib.Path) -> None:
    other = Image.fromarray(255 - HALVES)
    for suffix in (".gif", ".tif", ".png", ".webp"):
        path = root / "train" / "a" / f"1{suffix}"
        Image.fromarray(HALVES).save(path, save_all=True, append_images=[other, other], lossless=True)
    x = in_memory(load("image_folder", str(root), None)).x_train
    np.testing.assert_array_equal(x, np.broadcast_to(HALVES, (6, 8, 8, 3)))


def test_the_content_and_not_the_suffix_says_how_a_picture_is_read(root: pathlib.Path) -> None:
    Image.fromarray(HALVES).save(root / "train" / "a" / "1.jpg", format="WEBP", lossless=True)
    np.testing.assert_array_equal(in_memory(load("image_folder", str(root), None)).x_train[1], HALVES)
    Image.fromarray(HALVES).save(root / "train" / "a" / "2.png", format="ICO")
    with pytest.raises(UserError, match=r"2.png .not an image of a known format"):
        in_memory(load("image_folder", str(root), None))


def wild(folder: pathlib.Path) -> dict[str, str]:
    """Add everything that folders hold beside pictures; return why each of it is not used."""
    save(folder / "deep" / "er" / "1.png")
    save(folder.parent / "elsewhere" / "2.png")
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    (folder / "link.png").symlink_to(folder.parent / "elsewhere" / "2.png")
    (folder / "deep" / "back").symlink_to(folder)
    (folder / "dead.png").symlink_to("/nowhere.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    os.mkfifo(folder / "pipe.png")
    for name in ("notes.txt", "._0.png", "Thumbs.db", "README", "x.averylongsuffix"):
        (folder / name).write_text("")
    save(folder / ".thumbnails" / "3.png")
    save(folder / "__MACOSX" / "4.png")
    return {
        "._0.png": "hidden",
        ".thumbnails": "hidden",
        "__MACOSX": "hidden",
        "README": "without a suffix",
        "Thumbs.db": "of type .db",
        "dead.png": "linked to nothing",
        "deep/back": "linked to a folder above",
        "itself.png": "that cannot be opened (Too many levels of symbolic links)",
        "notes.txt": "of type .txt",
        "pipe.png": "neither file nor folder",
        "x.averylongsuffix": "of another type",
    }


USED = ["0.png", "deep/er/1.png", "link.png", "linked/2.png"]


def test_whatever_is_not_a_picture_has_a_reason(root: pathlib.Path) -> None:
    folder = root / "train" / "a"
    expected = wild(folder)
    found = find.below(folder)
    assert names(found.pictures, folder) == USED
    assert reasons(found, folder) == expected
    words = find.counted([*found.unused, find.Unused("z", "of type .z")])
    assert words.startswith("3 hidden, 1 ") and words.endswith(", 2 for other reasons")
    assert words.count(", ") == 8


def test_folders_that_link_to_each_other_are_walked_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Walked once a way, these eight would be walked 109,600 times."""
    root, opened = tmp_path / "set", []
    for split in ("train", "test"):
        for one in range(8):
            save(root / split / "a" / f"f{one}" / "0.png")
            for other in range(8):
                if other != one:
                    (root / split / "a" / f"f{one}" / f"to_f{other}").symlink_to(f"../f{other}")
    scandir = os.scandir

    def counting(path: pathlib.Path) -> object:
        opened.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    folder = root / "train" / "a"
    found = find.below(folder)
    assert names(found.pictures, folder) == [f"f{one}/0.png" for one in range(8)]
    assert find.counted(found.unused) == "56 linked a second time" and len(opened) == 9
    dataset = load("image_folder", str(root), None)
    assert len(dataset.x_train) == 8 and find.counted(dataset.unused) == "112 linked a second time"


def test_a_folder_counts_where_it_is_itself(tmp_path: pathlib.Path) -> None:
    """Else at the first of the links to it, in the order of their paths."""
    folder = tmp_path / "in"
    save(folder / "real" / "0.png")
    save(tmp_path / "out" / "sub" / "1.png")
    (folder / "a_link").symlink_to("real")
    (folder / "b_out").symlink_to("../out")
    (folder / "c_out").symlink_to("../out")
    (folder / "d_sub").symlink_to("../out/sub")
    (tmp_path / "out" / "back").symlink_to("../in")
    found = find.below(folder)
    assert names(found.pictures, folder) == ["b_out/sub/1.png", "real/0.png"]
    second = dict.fromkeys(("a_link", "c_out", "d_sub"), "linked a second time")
    assert reasons(found, folder) == second | {"b_out/back": "linked to a folder above"}


def test_an_unreadable_folder_is_not_passed_over(root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "train" / "a"
    save(folder / "locked" / "1.png")
    scandir = os.scandir

    def refusing(path: pathlib.Path) -> object:  # also where the tests run as root
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = find.below(folder)
    assert names(found.pictures, folder) == ["0.png"]
    assert reasons(found, folder) == {"locked": "that cannot be opened (Permission denied)"}
    (root / "train" / "locked").mkdir()
    with pytest.raises(UserError, match=r"locked holds no picture .not used: 1 that cannot be opened"):
        load("image_folder", str(root), None)


def test_training_reads_what_encode_reads(root: pathlib.Path) -> None:
    expected = wild(root / "train" / "a")
    beside = {"train/loose.png": "beside the class folders", "val": "beside train and test"}
    save(root / "train" / "loose.png")
    save(root / "val" / "a" / "0.png")
    (root / "train" / "gone").symlink_to("/nowhere")
    dataset = load("image_folder", str(root), None)
    assert dataset.class_names == ("a", "b", "elsewhere")
    assert dataset.y_train.tolist() == [0] * len(USED) + [1, 2]
    found = {os.path.relpath(path, root): reason for path, reason in dataset.unused}
    assert found == beside | {"train/gone": "linked to nothing"} | {
        f"train/a/{name}": reason for name, reason in expected.items()
    }


def test_names_that_no_terminal_can_print(root: pathlib.Path) -> None:
    folder = root / "train" / "a"
    for name in (b"\xff.png", b"a\nb.txt"):
        (pathlib.Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes(
            (folder / "0.png").read_bytes()
        )
    dataset = load("image_folder", str(root), None)
    assert dataset.y_train.tolist() == [0, 0, 1]
    ((path, reason),) = dataset.unused
    assert (path, reason) == (f"{folder}/a\N{REPLACEMENT CHARACTER}b.txt", "of type .txt")
