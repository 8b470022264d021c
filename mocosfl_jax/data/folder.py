"""A folder of pictures, with one folder per class."""

from functools import partial
from pathlib import Path

from mocosfl_jax.data import find
from mocosfl_jax.data.decode import Picture, on_disk, open_file, shape_of
from mocosfl_jax.data.find import Unused
from mocosfl_jax.data.images import Loaded
from mocosfl_jax.errors import UserError


def load(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads the pictures below `directory/train/CLASS` and `directory/test/CLASS` (or `val` for `test`).

    The classes are the sorted folder names of `train`; `test` may lack some of them. `find` says which files
    are pictures. They are in sorted order and stay on disk. They are decoded to RGB when they are read and,
    if `image_size` is set, resized by `images.fit`.

    Raises:
      UserError: If a folder is missing or has no pictures. Reading raises it if too many pictures do not
        decode (see `decode.tolerant`), or if sizes differ and `image_size` is None.
    """
    train = directory / "train"
    test = next((directory / split for split in ("test", "val") if (directory / split).is_dir()), None)
    if not train.is_dir() or test is None:
        raise UserError(f"directory: {directory} needs a folder train and a folder test (or val) of classes")
    root = find.listing(directory)
    beside = [path for path in (*root.folders, *root.pictures) if path not in (train, test)]
    unused = [*root.unused, *(find.unused(path, f"beside train and {test.name}") for path in beside)]

    classes, unused_train = _classes(train)
    unknown = [folder for folder in find.listing(test).folders if folder.name not in classes]
    if unknown:
        raise UserError(f"directory: {unknown[0]} is a class that {train} lacks")
    test_classes, unused_test = _classes(test)
    label = {class_name: number for number, class_name in enumerate(classes)}

    def pictures(paths: dict[str, list[Path]]) -> list[Picture]:
        return [
            Picture(str(path), partial(open_file, path), label[class_name])
            for class_name in paths
            for path in paths[class_name]
        ]

    train_pictures, test_pictures = pictures(classes), pictures(test_classes)
    shape = shape_of(train_pictures, image_size)
    x_train, y_train, whole = on_disk(str(train), train_pictures, shape, image_size, max_broken)
    x_test, y_test, _ = on_disk(str(test), test_pictures, shape, image_size, max_broken)
    unused += unused_train + unused_test
    return Loaded(
        x_train, y_train, x_test, y_test, tuple(classes), f"image folder {directory}", tuple(unused), whole
    )


def _classes(split: Path) -> tuple[dict[str, list[Path]], list[Unused]]:
    """The pictures of each class of a split, both sorted, and what is not used."""
    there = find.listing(split)
    if not there.folders:
        raise UserError(f"directory: {split} holds no folders, one for each class is needed")
    unused = [*there.unused, *(find.unused(path, "beside the class folders") for path in there.pictures)]
    classes = {}
    for folder in there.folders:
        found = find.below(folder)
        if not found.pictures:
            others = f" (not used: {find.counted(found.unused)})" if found.unused else ""
            raise UserError(
                f"directory: {folder} holds no picture{others}, allowed: {', '.join(find.SUFFIXES)}"
            )
        classes[folder.name] = found.pictures
        unused += found.unused
    return classes, unused
