"""Where the official CIFAR files are and how large; reads them from a folder or an archive."""

import gzip
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mocosfl_jax.errors import UserError

PIXELS = 3 * 32 * 32
_MAX_NAMES_BYTES = 1 << 16
# The official archives unpack to 186 MB; pickles written anew with text for bytes take up to twice that.
_MAX_UNPACKED = 1 << 29
_CHUNK_BYTES = 1 << 20


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


class _Bounded(gzip.GzipFile):
    """Refuses to go beyond a number of bytes: a small gzip file can unpack to anything."""

    left = _MAX_UNPACKED

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {_MAX_UNPACKED:,} bytes")
        return data


def archive_files(path: Path, layout: Layout) -> Iterator[tuple[str, bytes]]:
    """The files of the layout, read in memory in the order of the archive; nothing is extracted.

    Raises UserError for an archive that does not parse and for a file of a wrong size.
    """
    wanted = {f"{layout.folder}/{file}": file for file in (layout.names, *layout.train, layout.test)}
    try:
        with _Bounded(path) as stream:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK_BYTES) as archive:
                for member in archive:
                    file = wanted.pop(member.name.removeprefix("./"), None)
                    if file is None:
                        continue
                    where = f"{path}: {file}"
                    if not member.isreg() or member.issparse():
                        raise UserError(f"{where}: not a regular file in the archive")
                    _check_size(file, member.size, layout, where)
                    contents = archive.extractfile(member)
                    data = contents.read() if contents else b""
                    if len(data) != member.size:
                        raise UserError(f"{where}: truncated, {len(data):,} of {member.size:,} bytes")
                    yield file, data
            # gzip compares its checksum only at the end of the stream.
            while stream.read(_CHUNK_BYTES):
                pass
    except UserError:
        raise
    except Exception as error:  # tarfile and gzip raise many kinds for a broken file
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path}: truncated or malformed archive ({reason})") from error
