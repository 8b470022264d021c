"""Where the official CIFAR files are and how large; reads them from a folder or an archive."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mocosfl_jax.data.tar import tar_files
from mocosfl_jax.errors import UserError

PIXELS = 3 * 32 * 32
_MAX_NAMES_BYTES = 1 << 16
# The official archives unpack to 186 MB; pickles written anew with text for bytes take up to twice that.
_MAX_UNPACKED = 1 << 29


class Layout(NamedTuple):
    """One official archive and the folder inside it."""

    archive: str
    size: int  # of the archive, as published
    sha256: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str  # the file of class names
    rows: tuple[int, int]  # images in a training file and in the test file
    # Key of the labels in a pickle; in binary files the label bytes of a record, of which the last counts.
    label: str | int
    names_key: str = ""


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "cifar10": (
        Layout(
            "cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            "cifar-10-batches-bin",
            tuple(f"data_batch_{n}.bin" for n in range(1, 6)),
            "test_batch.bin",
            "batches.meta.txt",
            (10_000, 10_000),
            1,
        ),
        Layout(
            "cifar-10-python.tar.gz",
            170_498_071,
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            "cifar-10-batches-py",
            tuple(f"data_batch_{n}" for n in range(1, 6)),
            "test_batch",
            "batches.meta",
            (10_000, 10_000),
            "labels",
            "label_names",
        ),
    ),
    "cifar100": (
        Layout(
            "cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            "cifar-100-binary",
            ("train.bin",),
            "test.bin",
            "fine_label_names.txt",
            (50_000, 10_000),
            2,
        ),
        Layout(
            "cifar-100-python.tar.gz",
            169_001_437,
            "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            "cifar-100-python",
            ("train",),
            "test",
            "meta",
            (50_000, 10_000),
            "fine_labels",
            "fine_label_names",
        ),
    ),
}


def _check_size(file: str, size: int, layout: Layout, where: str) -> None:
    """Raises UserError before a file of the wrong size is read into memory."""
    if file == layout.names:
        if size > _MAX_NAMES_BYTES:
            raise UserError(f"{where}: {size:,} bytes, class names take at most {_MAX_NAMES_BYTES:,}")
        return
    rows = layout.rows[1] if file == layout.test else layout.rows[0]
    if isinstance(layout.label, int):
        record = layout.label + PIXELS
        if size != rows * record:
            raise UserError(
                f"{where}: truncated or malformed, {size:,} bytes, "
                f"{rows * record:,} are needed ({rows:,} records of {record:,})"
            )
        return
    # Twice the pixels for bytes written as text, and room for labels and file names.
    most = rows * 3 * PIXELS + _MAX_NAMES_BYTES
    if size > most:
        raise UserError(f"{where}: {size:,} bytes, at most {most:,} are allowed")


def folder_files(path: Path, layout: Layout) -> Iterator[tuple[str, bytes]]:
    """The files of the layout that a folder holds. Raises UserError for one of a wrong size."""
    for file in (layout.names, *layout.train, layout.test):
        if (path / file).is_file():
            _check_size(file, (path / file).stat().st_size, layout, f"{path}: {file}")
            yield file, (path / file).read_bytes()


def archive_files(path: Path, layout: Layout) -> Iterator[tuple[str, bytes]]:
    """The files of the layout that an archive holds, in its order. Raises UserError like `tar_files`."""

    def check_size(file: str, size: int) -> None:
        _check_size(file, size, layout, f"{path}: {file}")

    files = (layout.names, *layout.train, layout.test)
    return tar_files(path, layout.folder, files, check_size, _MAX_UNPACKED)
