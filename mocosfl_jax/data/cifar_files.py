"""Names and sizes of the official CIFAR files, which are read from a folder or an archive."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mocosfl_jax.data.tar import tar_files
from mocosfl_jax.errors import UserError

PIXELS = 3 * 32 * 32
_MAX_NAMES_BYTES = 1 << 16
# The official archives unpack to 186 MB. Pickles that were rewritten with text for bytes take up to twice
# that.
_MAX_UNPACKED = 1 << 29


class Layout(NamedTuple):
    """An official archive, and the folder in it."""

    archive: str
    size: int  # bytes of the published archive
    sha256: str
    folder: str
    train: tuple[str, ...]
    test: str
    names: str  # the file of class names
    rows: tuple[int, int]  # number of images in a training file and in the test file
    # In pickles, the key of the labels. In binary files, the number of label bytes of a record; the last one
    # is used.
    label: str | int
    names_key: str = ""  # in pickles, the key of the class names


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
    """Raises UserError if a file has the wrong size, before it is read into memory."""
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
    # Twice the pixels, as bytes may be written as text, and space for labels and file names.
    most = rows * 3 * PIXELS + _MAX_NAMES_BYTES
    if size > most:
        raise UserError(f"{where}: {size:,} bytes, at most {most:,} are allowed")


def folder_files(path: Path, layout: Layout) -> Iterator[tuple[str, bytes]]:
    """The names and contents of a layout's files in a folder.

    Raises:
      UserError: If a file has the wrong size.
    """
    for file in (layout.names, *layout.train, layout.test):
        if (path / file).is_file():
            _check_size(file, (path / file).stat().st_size, layout, f"{path}: {file}")
            yield file, (path / file).read_bytes()


def archive_files(path: Path, layout: Layout) -> Iterator[tuple[str, bytes]]:
    """The names and contents of a layout's files in an archive, in the order of the archive.

    Raises:
      UserError: If a file has the wrong size, or as raised by `tar_files`.
    """

    def check_size(file: str, size: int) -> None:
        _check_size(file, size, layout, f"{path}: {file}")

    files = (layout.names, *layout.train, layout.test)
    return tar_files(path, layout.folder, files, check_size, _MAX_UNPACKED)
