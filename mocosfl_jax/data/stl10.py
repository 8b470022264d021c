"""STL-10 from its official files, in an archive or unpacked."""

from pathlib import Path

import numpy as np

from mocosfl_jax.data.download import download, source_line
from mocosfl_jax.data.images import Loaded
from mocosfl_jax.data.tar import tar_files
from mocosfl_jax.errors import UserError

_ARCHIVE = "stl10_binary.tar.gz"
_FOLDER = "stl10_binary"
_URL = f"http://ai.stanford.edu/~acoates/stl10/{_ARCHIVE}"
_SIZE = 2_640_397_119
_SHA256 = "f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866"
# The official archive unpacks to 3.1 GB.
_MAX_UNPACKED = 1 << 32

_SIDE = 96
_PIXELS = 3 * _SIDE * _SIDE
_ROWS = {"train": 5_000, "test": 8_000}
_FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
_CLASS_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def load(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads STL-10: 5,000 training and 8,000 test images [96, 96, 3]. Its labels 1..10 become 0..9.

    `directory` holds the official archive or its unpacked folder, or is that folder. If there is none of
    them, the archive is downloaded. The 100,000 unlabeled images of `unlabeled_X.bin` are not used, but an
    archive is decompressed to its end every time.

    Raises:
      UserError: If a file is missing or does not have the official size.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"directory: {directory} is a file, the folder that holds it is needed")
    path = _find(directory)
    packed = path.name == _ARCHIVE and path.is_file()

    def check_size(file: str, size: int) -> None:
        needed = _ROWS[file.split("_")[0]] * (_PIXELS if "_X" in file else 1)
        if size != needed:
            raise UserError(f"{path}: {file}: truncated or malformed, {size:,} bytes, {needed:,} are needed")

    found: dict[str, np.ndarray] = {}
    if packed:
        for file, data in tar_files(path, _FOLDER, _FILES, check_size, _MAX_UNPACKED):
            found[file] = _array(file, data)
    else:
        for file in _FILES:
            if (path / file).is_file():
                check_size(file, (path / file).stat().st_size)
                found[file] = _array(file, (path / file).read_bytes())
    for file in _FILES:
        if file not in found:
            raise UserError(f"{path}: {file} is missing, {', '.join(_FILES)} are needed")
    x_train, y_train, x_test, y_test = (found[file] for file in _FILES)
    for file, y in (("train_y.bin", y_train), ("test_y.bin", y_test)):
        if y.min() < 0 or y.max() >= len(_CLASS_NAMES):
            wrong = (y.min() if y.min() < 0 else y.max()) + 1
            raise UserError(f"{path}: {file}: label {wrong}, allowed: 1 to {len(_CLASS_NAMES)}")
    source = source_line(path, _SIZE, _SHA256) if packed else str(path)
    return Loaded(x_train, y_train, x_test, y_test, _CLASS_NAMES, source)


def _find(directory: Path) -> Path:
    """The archive or the folder that exists. If neither exists, downloads the archive."""
    archive = directory / _ARCHIVE
    if archive.is_file():
        return archive
    for folder in (directory / _FOLDER, directory):
        if any((folder / file).is_file() for file in _FILES):
            return folder
    download(_URL, archive, _SIZE, _SHA256)
    return archive


def _array(file: str, data: bytes) -> np.ndarray:
    """Images [n, 96, 96, 3], stored as [n, channel, column, row], or labels that start at 0."""
    stored = np.frombuffer(data, np.uint8)
    if "_y" in file:
        return stored.astype(np.int32) - 1
    return np.ascontiguousarray(stored.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 3, 2, 1))
