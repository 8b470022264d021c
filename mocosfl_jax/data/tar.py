"""Reads chosen files of a tar.gz archive into memory. Nothing is extracted to disk."""

import gzip
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mocosfl_jax.errors import UserError, one_line

_CHUNK_BYTES = 1 << 20


class _Bounded(gzip.GzipFile):
    """A gzip file that unpacks to a limited number of bytes: a small file can unpack to any size."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path)
        self.most = self.left = most

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {self.most:,} bytes")
        return data


def tar_files(
    path: Path, folder: str, files: tuple[str, ...], check_size: Callable[[str, int], None], most: int
) -> Iterator[tuple[str, bytes]]:
    """Reads files of an archive, and yields the name and contents of each in the order of the archive.

    Args:
      path: The archive.
      folder: The folder in the archive.
      files: Names of the files to read in that folder. Those that the archive lacks are skipped.
      check_size: Called as `check_size(file, size)` before a file is read; may raise UserError.
      most: Limit, in bytes, of the unpacked archive.

    Raises:
      UserError: If the archive does not parse or unpacks to more than `most` bytes.
    """
    wanted = {f"{folder}/{file}": file for file in files}
    try:
        with _Bounded(path, most) as stream:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=_CHUNK_BYTES) as archive:
                for member in archive:
                    file = wanted.pop(member.name.removeprefix("./"), None)
                    if file is None:
                        continue
                    where = f"{path}: {file}"
                    if not member.isreg() or member.issparse():
                        raise UserError(f"{where}: not a regular file in the archive")
                    check_size(file, member.size)
                    contents = archive.extractfile(member)
                    data = contents.read() if contents else b""
                    if len(data) != member.size:
                        raise UserError(f"{where}: truncated, {len(data):,} of {member.size:,} bytes")
                    yield file, data
            # gzip verifies its checksum only at the end of the stream.
            while stream.read(_CHUNK_BYTES):
                pass
    except UserError:
        raise
    except Exception as error:  # tarfile and gzip raise many kinds of errors for a broken file
        reason = one_line(error)
        raise UserError(f"{path}: truncated or malformed archive ({reason})") from error
