"""A folder of PNG and JPEG images, one folder a class."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mocosfl_jax.data.images import MAX_PIXELS, Loaded, fit, require_memory
from mocosfl_jax.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg")
_FORMATS = ("PNG", "JPEG")
# The others hold more than 8 bits, which a conversion would clip.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def load(name: str, directory: Path, image_size: int | None) -> Loaded:
    """`directory/train/CLASS/*.png|jpg|jpeg` and `directory/test/CLASS/...` (or `val` for `test`).

    Classes are the sorted folder names of `train`; `test` may lack some. Images are taken in sorted
    order, decoded to RGB and, with `image_size`, resized by `images.fit`. Hidden files are skipped.
    Raises UserError for folders without images, images that do not decode, and different sizes
    without `image_size`.
    """
    train = directory / "train"
    test = next((directory / split for split in ("test", "val") if (directory / split).is_dir()), None)
    if not train.is_dir() or test is None:
        raise UserError(
            f"config.data.dir: {directory} needs a folder train and a folder test (or val) of classes"
        )
    class_names = _classes(train)
    unknown = sorted(set(_classes(test)) - set(class_names))
    if unknown:
        raise UserError(f"config.data.dir: {test / unknown[0]} is a class that {train} lacks")
    train_files = _files(train, class_names)
    test_files = _files(test, class_names)
    shape = _shape(train_files[0][0], image_size)
    x_train, y_train = _decode_all(train_files, shape, image_size)
    x_test, y_test = _decode_all(test_files, shape, image_size)
    return Loaded(x_train, y_train, x_test, y_test, class_names, f"image folder {directory}")


def files_below(directory: Path) -> list[Path]:
    """Every image file in `directory` and the folders below it, sorted; hidden ones are skipped."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
        and path.is_file()
    )


def read(path: Path, image_size: int) -> np.ndarray | str:
    """The image as [image_size, image_size, 3] uint8, or why it cannot be read."""
    try:
        return np.asarray(_decode(path, image_size))
    except Exception as error:  # see _decode_all
        return _reason(error)


def _classes(split: Path) -> tuple[str, ...]:
    names = sorted(
        entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise UserError(f"config.data.dir: {split} holds no folders, one for each class is needed")
    return tuple(names)


def _files(split: Path, class_names: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Every image of a split with its label, sorted by class, then by name."""
    files = []
    for label, name in enumerate(class_names):
        if not (split / name).is_dir():
            continue
        found = [
            path
            for path in sorted((split / name).iterdir())
            if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
        ]
        if not found:
            raise UserError(f"config.data.dir: {split / name} holds no {', '.join(_SUFFIXES)} files")
        files += [(path, label) for path in found]
    return files


def _check(image: Image.Image) -> None:
    """Raises ValueError for an image, not decoded yet, that is too large or has more than 8 bits."""
    if image.size[0] * image.size[1] > MAX_PIXELS:
        raise ValueError(f"{image.size[0]}x{image.size[1]} pixels, at most {MAX_PIXELS:,} in all are allowed")
    if image.mode not in _MODES:
        raise ValueError(f"mode {image.mode}, 8 bits a channel are needed")


def _decode(path: Path, image_size: int | None) -> Image.Image:
    with Image.open(path, formats=_FORMATS) as image:
        _check(image)
        # Pillow warns where a palette's transparency is dropped without the step through RGBA.
        through = image.convert("RGBA") if image.mode in ("P", "PA") else image
        rgb = through.convert("RGB")
    return rgb if image_size is None else fit(rgb, image_size)


def _shape(path: Path, image_size: int | None) -> tuple[int, int, int]:
    """[H, W, 3] of every image: `image_size`, or that of the first."""
    if image_size is not None:
        return image_size, image_size, 3
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _check(image)
            return image.size[1], image.size[0], 3
    except Exception as error:  # see _decode_all
        raise UserError(f"{path}: not a readable image ({_reason(error)})") from error


def _decode_all(
    files: list[tuple[Path, int]], shape: tuple[int, int, int], image_size: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, H, W, 3] uint8 and labels [n] int32 of these files, in their order."""
    count = len(files)
    require_memory(f"{files[0][0].parent.parent}: {count} images", count * shape[0] * shape[1] * 3)
    pixels = np.empty((count, *shape), np.uint8)

    def decode(index: int) -> str | None:
        try:
            image = _decode(files[index][0], image_size)
        except Exception as error:  # decoders raise many kinds for a broken file
            return _reason(error)
        height, width, _ = shape
        if image.size != (width, height):
            found = f"{image.size[0]}x{image.size[1]}"
            raise UserError(
                f"{files[index][0]}: {found} pixels, but others have {width}x{height}: "
                "set config.data.image_size"
            )
        pixels[index] = np.asarray(image)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(pool.map(decode, range(count)))
    broken = [index for index, reason in enumerate(reasons) if reason is not None]
    if broken:
        first = broken[0]
        raise UserError(
            f"{files[first][0]}: not a readable image ({reasons[first]}); {len(broken)} of {count} are not"
        )
    return pixels, np.array([label for _, label in files], np.int32)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
