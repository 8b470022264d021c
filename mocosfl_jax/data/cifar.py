"""CIFAR-10 and CIFAR-100 from their official files, in an archive or unpacked, binary or pickled."""

from pathlib import Path

import numpy as np

from mocosfl_jax.data import cifar_pickle
from mocosfl_jax.data.cifar_files import LAYOUTS, PIXELS, Layout, archive_files, folder_files
from mocosfl_jax.data.download import download, source_line
from mocosfl_jax.data.images import Loaded
from mocosfl_jax.errors import UserError

_URL = "https://www.cs.toronto.edu/~kriz/"
_SIDE = 32


_CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(str(label) for label in range(100)),
}


def load(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads cifar10 or cifar100 from `directory`.

    `directory` holds an official archive or its unpacked folder, or is that folder. Archives are preferred to
    folders, and binary files to pickled ones. If there is none of them, the binary archive is downloaded.
    Class names come from the files if they include them.

    Raises:
      UserError: If a file is missing, does not parse, or does not hold the official number of images.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"directory: {directory} is a file, the folder that holds it is needed")
    layout, path = _find(LAYOUTS[name], directory)
    packed = path.name == layout.archive and path.is_file()
    source = source_line(path, layout.size, layout.sha256) if packed else str(path)

    x_train = np.empty((len(layout.train) * layout.rows[0], _SIDE, _SIDE, 3), np.uint8)
    y_train = np.empty(len(x_train), np.int32)
    x_test = np.empty((layout.rows[1], _SIDE, _SIDE, 3), np.uint8)
    y_test = np.empty(len(x_test), np.int32)
    class_names = _CLASS_NAMES[name]
    missing = {*layout.train, layout.test}
    for file, data in archive_files(path, layout) if packed else folder_files(path, layout):
        where = f"{path}: {file}"
        if file == layout.names:
            class_names = _names(data, layout, len(class_names), where)
            continue
        missing.discard(file)
        x, y = x_test, y_test
        if file != layout.test:
            rows = layout.rows[0]
            start = layout.train.index(file) * rows
            x, y = x_train[start : start + rows], y_train[start : start + rows]
        labels, pixels = _records(data, layout, len(x), where)
        if labels.min() < 0 or labels.max() >= len(class_names):
            found = labels.min() if labels.min() < 0 else labels.max()
            raise UserError(f"{where}: label {found}, allowed: 0 to {len(class_names) - 1}")
        y[:] = labels
        x[:] = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    if missing:
        raise UserError(
            f"{path}: {min(missing)} is missing, {', '.join(layout.train)}, {layout.test} are needed"
        )
    return Loaded(x_train, y_train, x_test, y_test, class_names, source)


def _find(layouts: tuple[Layout, ...], directory: Path) -> tuple[Layout, Path]:
    """The first archive or folder that exists. If none exists, downloads an archive."""
    for layout in layouts:
        if (directory / layout.archive).is_file():
            return layout, directory / layout.archive
    for layout in layouts:
        if (directory / layout.folder).is_dir():
            return layout, directory / layout.folder
    for layout in layouts:
        if any((directory / file).is_file() for file in (*layout.train, layout.test)):
            return layout, directory
    layout = layouts[0]
    target = directory / layout.archive
    download(_URL + layout.archive, target, layout.size, layout.sha256)
    return layout, target


def _records(data: bytes, layout: Layout, rows: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The labels [rows] and pixels [rows, 3072] (red, green and blue planes) in a file."""
    if isinstance(layout.label, int):
        records = np.frombuffer(data, np.uint8).reshape(rows, layout.label + PIXELS)
        return records[:, layout.label - 1], records[:, layout.label :]
    content = _unpickle(data, where)
    pixels = content.get("data")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (rows, PIXELS):
        raise UserError(f"{where}: truncated or malformed, data must be a uint8 array [{rows}, {PIXELS}]")
    found = content.get(layout.label)
    # Text would be padded to the length of the longest.
    listed = isinstance(found, list) and all(type(label) is int for label in found)
    labels = np.asarray(found) if listed or isinstance(found, np.ndarray) else np.empty(0)
    if labels.dtype.kind not in "iu" or labels.shape != (rows,):
        raise UserError(f"{where}: truncated or malformed, {layout.label} must be {rows} integers")
    return labels, pixels


def _unpickle(data: bytes, where: str) -> dict[str, object]:
    try:
        return cifar_pickle.read(data)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _names(data: bytes, layout: Layout, classes: int, where: str) -> tuple[str, ...]:
    """The class names in a meta file."""
    try:
        found = _unpickle(data, where).get(layout.names_key) if layout.names_key else data.decode().split()
        names = found if isinstance(found, list) else []
        if len(names) != classes:
            raise UserError(f"{where}: {len(names)} class names, {classes} are needed")
        if any(isinstance(name, int) for name in names):
            raise UserError(f"{where}: class names are numbers, text is needed")
        return tuple(name.decode() if isinstance(name, bytes) else name for name in names)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: class names are not text") from error
