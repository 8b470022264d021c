"""Tiny ImageNet from its official zip file, or from the folder in it."""

import io
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from mocosfl_jax.data.decode import Picture, on_disk, open_file, shape_of
from mocosfl_jax.data.download import download, source_line
from mocosfl_jax.data.images import Loaded
from mocosfl_jax.errors import UserError, one_line

_ARCHIVE = "tiny-imagenet-200.zip"
_FOLDER = "tiny-imagenet-200"
_URL = f"http://cs231n.stanford.edu/{_ARCHIVE}"
_SIZE = 248_100_043
_SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"
_MAX_FILE_BYTES = 1 << 24  # the largest official file, words.txt, has 2.6 MB

_ANNOTATIONS = "val/val_annotations.txt"
_TRAIN_IMAGE = re.compile(r"train/([^/.][^/]*)/images/[^/.][^/]*\.JPEG")

# Path in the folder -> function that opens the file.
_Files = dict[str, Callable[[], IO[bytes]]]


def load(name: str, directory: Path, image_size: int | None, max_broken: float) -> Loaded:
    """Loads Tiny ImageNet: 100,000 training images of 200 classes. The test set is `val`, 10,000 images.

    `directory` holds the zip file, which is read without unpacking it, or its unpacked folder, or is that
    folder. If there is none of them, the zip file is downloaded. The official test images have no labels and
    are not used. Classes are in the order of their WordNet ids, and are named by their first name in
    words.txt. Images are decoded when they are read.

    Raises:
      UserError: If files are missing. Reading raises it if too many images do not decode (see
        `decode.tolerant`).
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"directory: {directory} is a file, the folder that holds it is needed")
    path = _find(directory)
    if path.is_dir():
        unpacked: _Files = {
            file.relative_to(path).as_posix(): partial(open_file, file)
            for file in path.rglob("*")
            if file.is_file()
        }
        return _read(path, unpacked, str(path), image_size, max_broken)
    try:
        archive = zipfile.ZipFile(path)  # stays open, since its images are read later
    except Exception as error:  # zipfile raises many kinds of errors for a broken file
        raise UserError(f"{path}: truncated or malformed zip file ({one_line(error)})") from error
    members: _Files = {
        info.filename.removeprefix(f"{_FOLDER}/"): partial(_member, archive, info)
        for info in archive.infolist()
        if info.filename.startswith(f"{_FOLDER}/")
    }
    return _read(path, members, source_line(path, _SIZE, _SHA256), image_size, max_broken)


def _find(directory: Path) -> Path:
    """The zip file or the folder that exists. If neither exists, downloads the zip file."""
    archive = directory / _ARCHIVE
    if archive.is_file():
        return archive
    for folder in (directory / _FOLDER, directory):
        if (folder / "train").is_dir():
            return folder
    download(_URL, archive, _SIZE, _SHA256)
    return archive


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    """A file of the archive, read into memory. Its checksum is verified."""
    if info.file_size > _MAX_FILE_BYTES:
        raise ValueError(f"{info.file_size:,} bytes, at most {_MAX_FILE_BYTES:,} are allowed")
    with archive.open(info) as file:
        return io.BytesIO(file.read(info.file_size + 1))  # without a size, more is unpacked than is returned


def _read(path: Path, files: _Files, source: str, image_size: int | None, max_broken: float) -> Loaded:
    classes = {file: match[1] for file in sorted(files) if (match := _TRAIN_IMAGE.fullmatch(file))}
    wnids = sorted(set(classes.values()))
    if not wnids:
        raise UserError(f"{path}: no images train/CLASS/images/*.JPEG, those of Tiny ImageNet are needed")
    label = {wnid: index for index, wnid in enumerate(wnids)}

    def pictures(wnid_of: dict[str, str]) -> list[Picture]:
        return [Picture(f"{path}: {file}", files[file], label[wnid]) for file, wnid in wnid_of.items()]

    annotated = _annotations(path, files, label)
    words = dict(_columns(path, files, "words.txt")) if "words.txt" in files else {}
    class_names = tuple(words.get(wnid, wnid).split(",")[0] for wnid in wnids)
    train, test = pictures(classes), pictures(annotated)
    shape = shape_of(train, image_size)
    x_train, y_train, whole = on_disk(f"{path}: train", train, shape, image_size, max_broken)
    x_test, y_test, _ = on_disk(f"{path}: val", test, shape, image_size, max_broken)
    return Loaded(x_train, y_train, x_test, y_test, class_names, source, whole=whole)


def _annotations(path: Path, files: _Files, label: dict[str, int]) -> dict[str, str]:
    """Path -> WordNet id of each image of `val`, sorted by path."""
    found = {}
    for image, wnid in _columns(path, files, _ANNOTATIONS):
        file = f"val/images/{image}"
        if file not in files:
            raise UserError(f"{path}: {file} is missing, {_ANNOTATIONS} names it")
        if wnid not in label:
            raise UserError(f"{path}: {_ANNOTATIONS}: {wnid} is a class that train lacks")
        found[file] = wnid
    if not found:
        raise UserError(f"{path}: {_ANNOTATIONS} names no images")
    return dict(sorted(found.items()))


def _columns(path: Path, files: _Files, file: str) -> list[tuple[str, str]]:
    """The first two columns of a tab-separated text file."""
    if file not in files:
        raise UserError(f"{path}: {file} is missing")
    try:
        with files[file]() as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise ValueError(f"more than {_MAX_FILE_BYTES:,} bytes")
        rows = [line.split("\t") for line in data.decode().splitlines() if line]
        return [(row[0], row[1]) for row in rows]
    except Exception as error:  # zipfile raises many kinds of errors for a broken file
        raise UserError(
            f"{path}: {file}: not readable, columns of text are needed ({one_line(error)})"
        ) from error
