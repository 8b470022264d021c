"""SVHN, the cropped digits (format 2), from its official MATLAB files."""

import math
from pathlib import Path

import numpy as np
import scipy.io

from mocosfl_jax.data.download import download, source_line
from mocosfl_jax.data.images import Loaded, require_memory
from mocosfl_jax.errors import UserError, one_line

_URL = "http://ufldl.stanford.edu/housenumbers/"
_SHAPE = (32, 32, 3)  # shape of an image; X is [32, 32, 3, n]
# Size and SHA-256 of the published files.
_FILES = {
    "train_32x32.mat": (182_040_794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8"),
    "test_32x32.mat": (64_275_384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b"),
}


def load(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads `train_32x32.mat` and `test_32x32.mat` in `directory`, and downloads them if they are missing.

    They hold 73,257 and 26,032 images of digits in house numbers. `extra_32x32.mat` is not used. The files
    label the digit 0 as 10; here its label is 0.

    Raises:
      UserError: If a file cannot be downloaded, does not parse or holds other arrays.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"directory: {directory} is a file, the folder that holds it is needed")
    arrays: list[np.ndarray] = []
    sources = []
    for file, (size, sha256) in _FILES.items():
        path = directory / file
        if not path.is_file():
            download(_URL + file, path, size, sha256)
        arrays += _read(path)
        sources.append(source_line(path, size, sha256))
    x_train, y_train, x_test, y_test = arrays
    digits = tuple(str(digit) for digit in range(10))
    return Loaded(x_train, y_train, x_test, y_test, digits, " and ".join(sources))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The images [n, 32, 32, 3] and digits [n] in a file."""
    try:
        # Check the shapes first: a small file can claim any size, or unpack to it.
        shapes = {variable: (shape, kind) for variable, shape, kind in scipy.io.whosmat(path)}
        shape, kind = shapes.get("X", ((), "missing"))
        if len(shape) != 4 or shape[:3] != _SHAPE or kind != "uint8":
            raise UserError(f"{path}: X is {kind} {list(shape)}, allowed: uint8 [32, 32, 3, n]")
        labels_shape, labels_kind = shapes.get("y", ((), "missing"))
        if labels_shape != (shape[3], 1):
            raise UserError(
                f"{path}: y is {labels_kind} {list(labels_shape)}, allowed: numbers [n, 1], n {shape[3]}"
            )
        require_memory(f"{path}: X", math.prod(shape))
        content = scipy.io.loadmat(path, variable_names=("X", "y"))
        x, y = content["X"], content["y"][:, 0]
        if x.dtype != np.uint8 or x.shape != shape or y.dtype.kind not in "iuf":
            raise ValueError(f"X is {x.dtype} {list(x.shape)} and y {y.dtype}")
    except UserError:
        raise
    except Exception as error:  # scipy raises many kinds of errors for a broken file
        reason = one_line(error)
        raise UserError(f"{path}: truncated or malformed MATLAB file ({reason})") from error
    wrong = y[~np.isin(y, np.arange(1, 11))]
    if len(wrong):
        raise UserError(f"{path}: label {wrong[0]}, allowed: 1 to 10")
    return np.ascontiguousarray(x.transpose(3, 0, 1, 2)), y.astype(np.int32) % 10
