"""Image classification data sets prepared by tensorflow-datasets, read without TensorFlow."""

import contextlib
import difflib
import importlib
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mocosfl_jax.data.decode import Decoded, Picture, on_disk
from mocosfl_jax.data.images import Loaded
from mocosfl_jax.errors import UserError

_FORMATS = ("array_record", "parquet")


def load(
    name: str, directory: Path, image_size: int | None, max_broken: float, own_names: tuple[str, ...]
) -> Loaded:
    """Loads the splits `train` and `test` (or else `validation`) of a data set prepared in `directory`.

    The data set needs the features `image` (uint8, 1 or 3 channels) and `label`, and files in array_record or
    parquet, the formats that tensorflow-datasets reads without TensorFlow. Nothing is downloaded or prepared
    here, and no code of the data set is imported. Labels are read at once, images on demand (see
    `decode.tolerant` for images that do not decode).

    Args:
      name: The data set, optionally with a configuration and a version, as in `imagenette/160px:1.0.0`.
      directory: The data directory of tensorflow-datasets.
      image_size: Height and width in pixels, or None for the stored size.
      max_broken: Fraction of a split's images that may fail to decode.
      own_names: The names that this package reads itself, for the message about an unknown name.

    Raises:
      UserError: If there is no such data set, or it is not prepared or cannot be used.
    """
    unknown = f"name: {name!r} is none of {', '.join(own_names)}"
    tfds = _import(unknown)
    folder = _prepared(tfds, name, directory, own_names, unknown)
    _check_features(tfds, name, folder / "features.json")
    try:
        # Not `tfds.builder`, which imports the set's code, asks a server, and runs code of the community.
        builder = tfds.builder_from_directory(str(folder))
    except Exception as error:  # damaged files raise nearly any exception
        raise UserError(f"directory: {folder} is not readable ({_reason(error)})") from error
    formats = {kind.value for kind in builder.info.available_file_formats()}
    if not formats.intersection(_FORMATS):
        raise UserError(
            f"directory: {directory} holds {name} as {', '.join(sorted(formats))}, allowed: "
            f"{', '.join(_FORMATS)}; {_how_to(name, directory)} --overwrite"
        )
    splits = builder.info.splits
    test = "test" if "test" in splits else "validation"
    if "train" not in splits or test not in splits:
        raise UserError(
            f"name: {name} has the splits {', '.join(splits)}, needed: train, and test or validation"
        )
    class_names, shape = _features(tfds, name, builder.info.features, image_size)
    x_train, y_train, whole = _read(tfds, builder, "train", shape, image_size, max_broken)
    x_test, y_test, _ = _read(tfds, builder, test, shape, image_size, max_broken)
    source = f"tensorflow-datasets {builder.info.full_name}, train and {test}, from {directory}"
    return Loaded(x_train, y_train, x_test, y_test, class_names, source, whole=whole)


def _import(unknown: str) -> Any:
    try:
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise UserError(
            f"{unknown}; to read the sets of tensorflow-datasets: "
            f"pip install tensorflow-datasets importlib_resources pillow ({_reason(error)})"
        ) from error


_NAME = re.compile(r"([a-z0-9_]+)(?:/([A-Za-z0-9_.-]+))?(?::(\d+\.\d+\.\d+))?")  # NAME[/CONFIG][:VERSION]


def _prepared(tfds: Any, name: str, directory: Path, own_names: tuple[str, ...], unknown: str) -> Path:
    """The folder of the newest prepared version of a data set. Raises UserError if there is none.

    Names of the community (`namespace:name`) and arguments in names are refused, since tensorflow-datasets
    downloads and runs code for them.
    """
    parts = _NAME.fullmatch(name)
    if parts is None or ".." in name:
        raise UserError(f"{unknown}, and no NAME[/CONFIG][:VERSION] of tensorflow-datasets (in lower case)")
    base, config, version = parts.groups()
    home = directory / base
    found = [
        path.parent
        for pattern in ("*/features.json", "*/*/features.json")
        for path in home.glob(pattern)
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    ]
    fitting = [
        folder
        for folder in found
        if config in (None, folder.parent.relative_to(home).as_posix()) and version in (None, folder.name)
    ]
    if len({folder.parent for folder in fitting}) > 1:
        configs = sorted(folder.parent.relative_to(home).as_posix() for folder in fitting)
        raise UserError(
            f"name: found {name}, allowed: one configuration of those prepared in {directory}: "
            f"{', '.join(base if each == '.' else f'{base}/{each}' for each in dict.fromkeys(configs))}"
        )
    if fitting:
        return max(fitting, key=lambda folder: tuple(map(int, folder.name.split("."))))
    known = tfds.list_builders(with_community_datasets=False)
    if found or base in known:
        others = ", ".join(sorted(folder.relative_to(directory).as_posix() for folder in found))
        raise UserError(
            f"directory: {directory} does not hold {name} prepared"
            f"{f' (but {others})' if others else ''}; {_how_to(name, directory)}"
        )
    close = difflib.get_close_matches(base, [*own_names, *known], n=3)
    guess = f"; did you mean {' or '.join(close)}?" if close else ""
    raise UserError(
        f"{unknown}, and tensorflow-datasets has no such set, neither built in nor prepared in "
        f"{directory}{guess}"
    )


def _check_features(tfds: Any, name: str, path: Path) -> None:
    """Raises UserError if a features.json names a class that is not of tensorflow-datasets.

    To restore a feature, tensorflow-datasets imports the module that the file names.
    """
    allowed: set[str] = set()
    for feature in vars(tfds.features).values():
        if isinstance(feature, type) and issubclass(feature, tfds.features.FeatureConnector):
            allowed |= {f"{feature.__module__}.{feature.__name__}", *getattr(feature, "ALIASES", [])}
    try:
        named = list(_classes(json.loads(path.read_text())))
    except (ValueError, RecursionError) as error:
        raise UserError(f"directory: {path} is not readable ({_reason(error)})") from error
    if foreign := [each for each in named if not isinstance(each, str) or each not in allowed]:
        raise UserError(
            f"name: {name} has the feature {str(foreign[0])[:200]!r} ({path}), "
            "allowed: features of tensorflow_datasets itself, since others would run code"
        )


def _classes(value: Any) -> Iterator[Any]:
    """Whatever a features.json names as a class, in either of its two forms, also in JSON within strings."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("type", "pythonClassName", "python_class_name") and not isinstance(inner, dict):
                yield inner
            else:
                yield from _classes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _classes(inner)


def _how_to(name: str, directory: Path) -> str:
    """The command that prepares the data set. Further options can be appended."""
    install = (
        "" if importlib.util.find_spec("tensorflow") else "`pip install tensorflow` (only to prepare it), "
    )
    return f"prepare it: {install}then tfds build {name} --data_dir={directory} --file_format=array_record"


def _features(
    tfds: Any, name: str, features: Any, image_size: int | None
) -> tuple[tuple[str, ...], tuple[int, int, int]]:
    """The class names, and the shape [H, W, 3] of the images after resizing."""
    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = found.get("image"), found.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(f"name: {name} has no features image and label, which are needed")
    height, width, channels = image.shape
    if np.dtype(image.np_dtype) != np.uint8 or channels not in (1, 3):
        raise UserError(
            f"name: {name} has images of {channels} channels of {np.dtype(image.np_dtype)}, "
            "allowed: 1 or 3 of uint8"
        )
    if image_size is not None:
        return tuple(label.names), (image_size, image_size, 3)
    if height is None or width is None:
        raise UserError(f"image_size: found None, but images of {name} differ in size: set it")
    return tuple(label.names), (height, width, 3)


def _read(
    tfds: Any,
    builder: Any,
    split: str,
    shape: tuple[int, int, int],
    image_size: int | None,
    max_broken: float,
) -> Decoded:
    """The images of a split."""
    where = f"{builder.info.name}, split {split}"
    try:
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        labels = [int(source[index]["label"]) for index in range(len(source))]
    except Exception as error:  # readers raise many kinds of errors for a broken file
        raise UserError(f"{where}: not readable in {builder.data_path} ({_reason(error)})") from error

    def open_image(index: int) -> io.BytesIO:
        return io.BytesIO(source[index]["image"])

    pictures = [
        Picture(f"image {index}", partial(open_image, index), label) for index, label in enumerate(labels)
    ]
    return on_disk(where, pictures, shape, image_size, max_broken)


def _reason(error: Exception) -> str:
    """The first line of an error message, which in TFDS is often a page long."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].strip()
