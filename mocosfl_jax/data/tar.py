"""Reads chosen files of a tar.gz archive in memory; nothing is extracted."""

import gzip
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from mocosfl_jax.errors import UserError, one_line

_CHUNK_BYTES = 1 << 20


class _Bounded(gzip.GzipFile):
    """Refuses to go beyond a number of bytes: a small gzip file can unpack to anything."""

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
    """Name and contents of those of `files` that the archive holds in `folder`, in its order.

    `check_size(file, size)` may refuse a file before it is read; an archive that unpacks to more than
    `most` bytes is refused too, and one that does not parse. Raises UserError.
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
            # gzip compares its checksum only at the end of the stream.
            while stream.read(_CHUNK_BYTES):
                pass
    except UserError:
        raise
    except Exception as error:  # tarfile and gzip raise many kinds for a broken file
        reason = one_line(error)
        raise UserError(f"{path}: truncated or malformed archive ({reason})") from error
