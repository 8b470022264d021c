"""A folder of PNG and JPEG images, with one folder per class."""

from functools import partial
from pathlib import Path

from mocosfl_jax.data.decode import Picture, on_disk, open_file, shape_of
from mocosfl_jax.data.images import Loaded
from mocosfl_jax.errors import UserError

_SUFFIXES = (".png", ".jpg", ".jpeg")


def load(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads `directory/train/CLASS/*.png|jpg|jpeg` and `directory/test/CLASS/...` (or `val` for `test`).

    The classes are the sorted folder names of `train`; `test` may lack some of them. Images are in sorted
    order and stay on disk. They are decoded to RGB when they are read and, if `image_size` is set, resized by
    `images.fit`. Hidden files are skipped.

    Raises:
      UserError: If a folder is missing or has no images. Reading raises it if too many images do not decode
        (see `decode.tolerant`), or if sizes differ and `image_size` is None.
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
    train_pictures = _pictures(train, class_names)
    test_pictures = _pictures(test, class_names)
    shape = shape_of(train_pictures, image_size)
    x_train, y_train = on_disk(str(train), train_pictures, shape, image_size, max_broken)
    x_test, y_test = on_disk(str(test), test_pictures, shape, image_size, max_broken)
    return Loaded(x_train, y_train, x_test, y_test, class_names, f"image folder {directory}")


def files_below(directory: Path) -> list[Path]:
    """All image files in `directory` and the folders below it, sorted. Hidden ones are skipped."""
    return sorted(
        path
        for path in directory.rglob("*")
        if path.suffix.lower() in _SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(directory).parts)
        and path.is_file()
    )


def _classes(split: Path) -> tuple[str, ...]:
    names = sorted(
        entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if not names:
        raise UserError(f"config.data.dir: {split} holds no folders, one for each class is needed")
    return tuple(names)


def _pictures(split: Path, class_names: tuple[str, ...]) -> list[Picture]:
    """All images of a split, sorted by class, then by name."""
    pictures: list[Picture] = []
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
        pictures += [Picture(str(path), partial(open_file, path), label) for path in found]
    return pictures
