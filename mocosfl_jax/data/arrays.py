"""Data sets in npz and npy files: the user's own, and the bundled sample of Fashion-MNIST."""

import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np

from mocosfl_jax.data.decode import open_file
from mocosfl_jax.data.images import Images, Loaded, OnDisk, in_memory, require_memory, rgb
from mocosfl_jax.errors import UserError

_SAMPLE = "fashion_mnist_sample.npz"
_PADDING = 2  # pixels on each side: 28 -> 32
_HEADER_BYTES = 1 << 14
# Deflate cannot compress more than this, so a member that claims a higher ratio is malformed.
_MAX_RATIO = 1040
_CHUNK_BYTES = 1 << 24
_LOCAL_HEADER = 30  # bytes before the name of a member in a zip file
_IMAGES = "a uint8 array [n, H, W, 3], [n, H, W, 1] or [n, H, W] of values 0..255"
_NEEDED = ("x_train", "y_train", "x_test", "y_test")


def load_sample(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads the bundled sample of Fashion-MNIST: 6,000 training images and 1,000 test images.

    The images are stored as [n, 28, 28] and padded with zeros to [n, 32, 32, 3]. `directory` is not read.

    Raises:
      UserError: If the sample is missing from the installation.
    """
    try:
        with (resources.files("mocosfl_jax.data") / _SAMPLE).open("rb") as file:
            loaded = _read_npz(file, None, _SAMPLE)
    except FileNotFoundError as error:
        raise UserError(
            f"name: {name} needs {_SAMPLE}, which this installation lacks; install it again"
        ) from error
    border = ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0))
    return loaded._replace(
        x_train=np.pad(in_memory(loaded.x_train), border),
        x_test=np.pad(in_memory(loaded.x_test), border),
        source="bundled sample of Fashion-MNIST (Zalando SE, MIT licence), padded to 32x32",
    )


def load_npz(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads the npz file `directory`, or the only npz file in that folder.

    Its arrays are x_train and x_test (uint8, [n, H, W, 3], [n, H, W, 1] or [n, H, W]), y_train and y_test
    (integers, [n]) and optionally class_names (text, [C]). Images that are stored without compression
    (`numpy.savez`) stay on disk. Their checksum is verified only when all of them are read.

    Raises:
      UserError: If there is no such file, or it cannot be used.
    """
    path = directory
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if len(found) != 1:
            raise UserError(f"directory: {path} holds {len(found)} npz files, exactly one is needed")
        path = found[0]
    if not path.is_file():
        raise UserError(f"directory: {path} does not exist, an npz file or its folder is needed")
    with path.open("rb") as file:
        return _read_npz(file, path, str(path))


def load_npy(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads x_train.npy, y_train.npy, x_test.npy, y_test.npy and, if present, class_names.npy in `directory`.

    The arrays are those of `load_npz`. The images stay on disk.

    Raises:
      UserError: If a file is missing or cannot be used.
    """
    if not directory.is_dir():
        raise UserError(f"directory: {directory} is not a folder, a folder of npy files is needed")

    def array(key: str) -> _Array | None:
        path = directory / f"{key}.npy"
        if not path.is_file():
            return None
        return _Array(str(path), path.stat().st_size, partial(open_file, path), (path, 0))

    return _loaded(array, str(directory))


def _read_npz(file: IO[bytes], path: Path | None, where: str) -> Loaded:
    """Reads an open file. `path` is its path if its images may stay on disk, and None otherwise."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())

            def array(key: str) -> _Array | None:
                if f"{key}.npy" not in names:
                    return None
                info = archive.getinfo(f"{key}.npy")
                what = f"{where}: {key}"
                if info.file_size > _MAX_RATIO * (info.compress_size + 1):
                    raise UserError(
                        f"{what}: malformed, {info.file_size:,} bytes claimed for {info.compress_size:,}"
                    )
                stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
                place = (path, _offset(path, info)) if path and stored else None
                return _Array(what, info.file_size, partial(_open_member, archive, path, info), place)

            return _loaded(array, where)
    except UserError:
        raise
    except Exception as error:  # zipfile raises many kinds of errors for a broken file
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> UserError:
    reason = " ".join(f"{type(error).__name__} {error}".split())
    return UserError(f"{where}: not a readable npz file ({reason})")


def _open_member(archive: zipfile.ZipFile, path: Path | None, info: zipfile.ZipInfo) -> IO[bytes]:
    """Opens a member of the archive, and the archive too if it has been closed."""
    if archive.fp is None and path:
        archive = zipfile.ZipFile(path)
    return archive.open(info)


def _offset(path: Path, info: zipfile.ZipInfo) -> int:
    """The position in the archive at which the contents of a member begin."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        start = file.read(_LOCAL_HEADER)
    # The lengths of the name and of the extra field follow. They may differ from those in the archive's
    # directory.
    return info.header_offset + _LOCAL_HEADER + sum(struct.unpack_from("<HH", start, _LOCAL_HEADER - 4))


def _loaded(array: Callable[[str], "_Array | None"], where: str) -> Loaded:
    arrays = {key: array(key) for key in _NEEDED}
    x_train, y_train, x_test, y_test = (_present(arrays[key], key, where) for key in _NEEDED)
    x, y = _images(x_train), _labels(y_train)
    tests, test_labels = _images(x_test), _labels(y_test)
    names = _class_names(array("class_names"), y, where)
    if x.shape[1:] != tests.shape[1:]:
        raise UserError(f"{where}: x_train is {x.shape} and x_test {tests.shape}, sizes must agree")
    return Loaded(x, y, tests, test_labels, names, where)


def _present(array: "_Array | None", key: str, where: str) -> "_Array":
    if array is None:
        raise UserError(f"{where}: {key} is missing, {', '.join(_NEEDED)} are needed")
    return array


def _images(array: "_Array") -> Images:
    shape, dtype = array.shape, array.dtype
    if dtype != np.uint8:
        hint = _hint(array) if dtype.kind in "fiu" and 0 not in shape else ""
        raise UserError(f"{array.what} is {dtype}, allowed: {_IMAGES}{hint}")
    gray = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
    if not (gray or (len(shape) == 4 and shape[3] == 3)) or 0 in shape:
        raise UserError(f"{array.what} has the shape {list(shape)}, allowed: {_IMAGES}, none empty")

    def load() -> np.ndarray:
        require_memory(array.what, math.prod(shape) * (3 if gray else 1))
        return rgb(array.read())

    mapped = array.mapped()
    if mapped is None:
        return load()
    return OnDisk((*shape[:3], 3), lambda rows: rgb(np.asarray(mapped[rows])), load)


def _hint(array: "_Array") -> str:
    """Says what the values are, and how they become uint8 if that is clear."""
    values = array.read()
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):  # rounding would hide them
        first = tuple(wrong[0].tolist())
        return f"; {len(wrong):,} values are not finite, the first is {values[first]} at {list(first)}"
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        advice = ": multiply by 255 and round"
    elif low >= 0 and high <= 255:
        advice = ": round, and convert to uint8" if values.dtype.kind == "f" else ": convert to uint8"
    else:
        advice = ""
    return f"; found values from {low:g} to {high:g}{advice}"


def _labels(array: "_Array") -> np.ndarray:
    if array.dtype.kind not in "iu" or len(array.shape) != 1:
        raise UserError(f"{array.what} is {array.dtype} {list(array.shape)}, allowed: integers [n]")
    return array.read()


def _class_names(array: "_Array | None", y_train: np.ndarray, where: str) -> tuple[str, ...]:
    if array is None:
        present = np.unique(y_train).tolist()
        if present != list(range(len(present))):
            found = f"from {present[0]} to {present[-1]}" if present else "in all"
            raise UserError(
                f"{where}: y_train has {len(present)} different labels {found}, "
                f"allowed: 0 to {len(present) - 1}"
            )
        return tuple(str(label) for label in present)
    if array.dtype.kind != "U" or len(array.shape) != 1 or not array.dtype.itemsize:
        raise UserError(f"{array.what} is {array.dtype} {list(array.shape)}, allowed: text [C]")
    texts = array.read()
    try:
        return tuple(str(text) for text in texts)
    except (SystemError, ValueError) as error:
        raise UserError(f"{array.what}: holds characters beyond Unicode, allowed: text [C]") from error


class _Array:
    """An array in a file. Its shape and dtype are read at once, its contents on demand.

    `numpy.load` would allocate whatever the header claims. Here the claimed size must equal the size of the
    contents, and must fit into the memory of the machine.
    """

    def __init__(
        self, what: str, size: int, open_: Callable[[], IO[bytes]], place: tuple[Path, int] | None
    ) -> None:
        """An array of `size` bytes, header included; `place` is the file and offset of uncompressed bytes."""
        self.what = what
        self._open = open_
        with open_() as file:
            self.shape, self._fortran, self.dtype, start = self._header(file.read(_HEADER_BYTES), size)
        self._skip = start
        self._place = place

    def _header(self, start: bytes, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
        buffer = io.BytesIO(start)
        try:
            version = np.lib.format.read_magic(buffer)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(buffer)
            else:
                raise ValueError(f"version {version}")
        except Exception as error:  # parsing the header, a Python literal, raises many kinds of errors
            reason = " ".join(str(error).split())
            raise UserError(f"{self.what}: malformed header ({reason})") from error
        if dtype.hasobject:
            raise UserError(f"{self.what}: holds Python objects, which are never loaded")
        contents = size - buffer.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != contents:
            raise UserError(
                f"{self.what}: truncated or malformed, {contents:,} bytes for {dtype} {list(shape)}"
            )
        return tuple(shape), fortran, dtype, buffer.tell()

    def _chunks(self) -> Iterator[bytes]:
        """The contents. zipfile verifies no checksum after a seek, so the header is read and dropped."""
        with self._open() as file:
            skip = self._skip
            # The last read, which returns nothing, makes zipfile verify the checksum.
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk[skip:]
                skip = max(0, skip - len(chunk))

    def read(self) -> np.ndarray:
        """The array, C-contiguous. Raises UserError if the contents end early or their checksum is wrong."""
        size = math.prod(self.shape) * self.dtype.itemsize
        require_memory(self.what, size)
        raw = np.empty(size, np.uint8)
        place = 0
        try:
            for chunk in self._chunks():
                raw[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
                place += len(chunk)
        except Exception as error:  # zipfile raises many kinds of errors for a broken file
            raise _unreadable(self.what, error) from error
        if place != size:
            raise UserError(f"{self.what}: truncated, {place:,} of {size:,} bytes")
        array = raw.view(self.dtype)
        if self._fortran:
            return np.ascontiguousarray(array.reshape(self.shape[::-1]).T)
        return array.reshape(self.shape)

    def mapped(self) -> np.ndarray | None:
        """The array as a read-only memory map, or None if it is compressed or in Fortran order."""
        if self._place is None or self._fortran:
            return None
        path, offset = self._place
        return np.memmap(path, self.dtype, "r", offset + self._skip, self.shape)
