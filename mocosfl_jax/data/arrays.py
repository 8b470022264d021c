"""Data sets in npz files: those of the user and the bundled sample of Fashion-MNIST."""

import io
import math
import zipfile
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np

from mocosfl_jax.data.images import Loaded, require_memory, rgb
from mocosfl_jax.errors import UserError

_SAMPLE = "fashion_mnist_sample.npz"
_PADDING = 2  # 28 -> 32 pixels a side
_HEADER_BYTES = 1 << 14
# Deflate cannot do better: a member that claims more is a lie.
_MAX_RATIO = 1040
_CHUNK_BYTES = 1 << 24
_IMAGES = "a uint8 array [n, H, W, 3], [n, H, W, 1] or [n, H, W] of values 0..255"


def load_sample(name: str, directory: Path, image_size: int | None) -> Loaded:
    """6,000 training and 1,000 test images of Fashion-MNIST, which come with this package.

    Stored [n, 28, 28]; here padded with zeros to [n, 32, 32, 3]. `directory` is not read.
    """
    try:
        with (resources.files("mocosfl_jax.data") / _SAMPLE).open("rb") as file:
            loaded = _read(file, _SAMPLE)
    except FileNotFoundError as error:
        raise UserError(
            f"config.data.name: {name} needs {_SAMPLE}, which this installation lacks: install again"
        ) from error
    border = ((0, 0), (_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0))
    return loaded._replace(
        x_train=np.pad(loaded.x_train, border),
        x_test=np.pad(loaded.x_test, border),
        source="bundled sample of Fashion-MNIST (Zalando SE, MIT licence), padded to 32x32",
    )


def load_npz(name: str, directory: Path, image_size: int | None) -> Loaded:
    """The npz file `directory`, or the only one in that folder.

    Arrays: x_train, x_test (uint8, [n, H, W, 3], [n, H, W, 1] or [n, H, W]), y_train, y_test (integers,
    [n]) and, if wanted, class_names (text, [C]). Raises UserError.
    """
    path = directory
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if len(found) != 1:
            raise UserError(f"config.data.dir: {path} holds {len(found)} npz files, exactly one is needed")
        path = found[0]
    if not path.is_file():
        raise UserError(f"config.data.dir: {path} is not there, an npz file or its folder is needed")
    with path.open("rb") as file:
        return _read(file, str(path))


def _read(file: IO[bytes], where: str) -> Loaded:
    try:
        with zipfile.ZipFile(file) as archive:
            x_train = _images(archive, "x_train", where)
            y_train = _labels(archive, "y_train", where)
            x_test = _images(archive, "x_test", where)
            y_test = _labels(archive, "y_test", where)
            names = _class_names(archive, y_train, where)
    except UserError:
        raise
    except Exception as error:  # zipfile raises many kinds for a broken file
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{where}: not a readable npz file ({reason})") from error
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(f"{where}: x_train is {x_train.shape} and x_test {x_test.shape}, sizes must agree")
    return Loaded(x_train, y_train, x_test, y_test, names, where)


def _images(archive: zipfile.ZipFile, key: str, where: str) -> np.ndarray:
    with _Member(archive, key, where) as member:
        shape, dtype = member.shape, member.dtype
        if dtype != np.uint8:
            hint = "; multiply by 255 and round" if dtype.kind == "f" else ""
            raise UserError(f"{where}: {key} is {dtype}, allowed: {_IMAGES}{hint}")
        gray = len(shape) == 3 or (len(shape) == 4 and shape[3] == 1)
        if not (gray or (len(shape) == 4 and shape[3] == 3)) or 0 in shape:
            raise UserError(f"{where}: {key} has the shape {list(shape)}, allowed: {_IMAGES}, none empty")
        require_memory(f"{where}: {key}", math.prod(shape) * (3 if gray else 1))
        return rgb(member.read())


def _labels(archive: zipfile.ZipFile, key: str, where: str) -> np.ndarray:
    with _Member(archive, key, where) as member:
        if member.dtype.kind not in "iu" or len(member.shape) != 1:
            raise UserError(f"{where}: {key} is {member.dtype} {list(member.shape)}, allowed: integers [n]")
        return member.read()


def _class_names(archive: zipfile.ZipFile, y_train: np.ndarray, where: str) -> tuple[str, ...]:
    if "class_names.npy" not in archive.namelist():
        present = np.unique(y_train).tolist()
        if present != list(range(len(present))):
            raise UserError(
                f"{where}: y_train has {len(present)} different labels from {present[0]} to {present[-1]}, "
                f"allowed: 0 to {len(present) - 1}"
            )
        return tuple(str(label) for label in present)
    with _Member(archive, "class_names", where) as member:
        if member.dtype.kind != "U" or len(member.shape) != 1 or not member.dtype.itemsize:
            raise UserError(f"{where}: class_names is {member.dtype} {list(member.shape)}, allowed: text [C]")
        return tuple(str(text) for text in member.read())


class _Member:
    """One array of the file: its shape and type first, its contents when they are wanted.

    `numpy.load` would allocate what the header claims. Here the claim must agree with the size of the
    member, that size with its compressed size, and both with the memory of the machine.
    """

    def __init__(self, archive: zipfile.ZipFile, key: str, where: str) -> None:
        self._what = f"{where}: {key}"
        try:
            info = archive.getinfo(f"{key}.npy")
        except KeyError as error:
            raise UserError(
                f"{where}: {key} is missing, x_train, y_train, x_test, y_test are needed"
            ) from error
        if info.file_size > _MAX_RATIO * (info.compress_size + 1):
            raise UserError(
                f"{self._what}: malformed, {info.file_size:,} bytes claimed for {info.compress_size:,}"
            )
        require_memory(self._what, info.file_size)
        self._file = archive.open(info)
        try:
            self.shape, self._fortran, self.dtype = self._header(info.file_size)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "_Member":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _header(self, size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        start = self._file.read(_HEADER_BYTES)
        buffer = io.BytesIO(start)
        try:
            version = np.lib.format.read_magic(buffer)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(buffer)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(buffer)
            else:
                raise ValueError(f"version {version}")
        except Exception as error:  # the header is parsed as a Python literal
            reason = " ".join(str(error).split())
            raise UserError(f"{self._what}: malformed header ({reason})") from error
        if dtype.hasobject:
            raise UserError(f"{self._what}: holds Python objects, which are never loaded")
        contents = size - buffer.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != contents:
            raise UserError(
                f"{self._what}: truncated or malformed, {contents:,} bytes for {dtype} {list(shape)}"
            )
        # Kept, because zipfile checks no checksum after a seek.
        self._start = buffer.read()
        return tuple(shape), fortran, dtype

    def read(self) -> np.ndarray:
        """The array, C-contiguous. Raises UserError where the contents end early or fail their checksum."""
        raw = np.empty(math.prod(self.shape) * self.dtype.itemsize, np.uint8)
        place = 0
        # The read that returns nothing makes zipfile compare the checksum.
        chunk = self._start
        while chunk:
            raw[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
            place += len(chunk)
            chunk = self._file.read(_CHUNK_BYTES)
        if place != len(raw):
            raise UserError(f"{self._what}: truncated, {place:,} of {len(raw):,} bytes")
        array = raw.view(self.dtype)
        if self._fortran:
            return np.ascontiguousarray(array.reshape(self.shape[::-1]).T)
        return array.reshape(self.shape)
