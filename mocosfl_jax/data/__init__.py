"""Data sets of 8-bit images: a bundled sample, official archives, npz and npy files, image folders, and TFDS.

    dataset = load("cifar10", "data", image_size=None)

`NAMES` lists the names that have a loader here. Any other name refers to tensorflow-datasets.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mocosfl_jax.data import arrays, canvas, cifar, folder, images, stl10, svhn, tfds_sets, tiny_imagenet
from mocosfl_jax.data.find import Unused
from mocosfl_jax.data.images import Images
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import user_path

__all__ = ["MAX_SIZE", "NAMES", "PUBLISHED", "SIZES", "Dataset", "Images", "Unused", "in_memory", "load"]

Channels = tuple[float, float, float]
_Loader = Callable[[str, Path, int | None, float], images.Loaded]

_LOADERS: dict[str, _Loader] = {
    "fashion_mnist_sample": arrays.load_sample,
    "cifar10": cifar.load,
    "cifar100": cifar.load,
    "svhn": svhn.load,
    "stl10": stl10.load,
    "tiny_imagenet": tiny_imagenet.load,
    "imagenet12": folder.load,
    "npz": arrays.load_npz,
    "npy": arrays.load_npy,
    "image_folder": folder.load,
}
NAMES: tuple[str, ...] = tuple(_LOADERS)

# Number of training images, and their height and width in pixels. imagenet12 is an image folder: its images
# differ in size and are resized to 224, and their number is approximate, 12 classes of about 1,300.
SIZES: dict[str, tuple[int, int]] = {
    "fashion_mnist_sample": (6_000, 32),
    "cifar10": (50_000, 32),
    "cifar100": (50_000, 32),
    "svhn": (73_257, 32),
    "stl10": (5_000, 96),
    "tiny_imagenet": (100_000, 64),
    "imagenet12": (15_600, 224),
}

_DECODED = ("tiny_imagenet", "imagenet12", "image_folder")  # and the sets of tensorflow-datasets

MAX_SIZE = math.isqrt(images.MAX_PIXELS)  # height and width of an image

# Mean and standard deviation of the channels with which the paper's experiments normalise images.
_SVHN = ((0.3522, 0.4004, 0.4463), (0.1189, 0.1377, 0.1784))
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
PUBLISHED: dict[str, tuple[Channels, Channels]] = {
    "cifar10": (_CIFAR10_MEAN, (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": _SVHN,
    "svhn_cropped": _SVHN,
    "stl10": (_CIFAR10_MEAN, (0.2471, 0.2435, 0.2616)),
    "tiny_imagenet": ((0.5141, 0.5775, 0.3985), (0.2927, 0.2570, 0.1434)),
    "imagenet12": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # those of ImageNet
}


class Dataset(NamedTuple):
    """A training set and a test set. Labels are 0..C-1, and each of them occurs in the training set."""

    x_train: images.Images  # [n, H, W, 3] uint8, in memory or on disk
    y_train: np.ndarray  # [n] int32
    x_test: images.Images  # [n, H, W, 3] uint8, in memory or on disk
    y_test: np.ndarray  # [n] int32
    class_names: tuple[str, ...]  # C names
    mean: Channels  # mean of each channel, for images in [0, 1]
    std: Channels  # standard deviation of each channel, for images in [0, 1]
    source: str  # one line that says where the images came from
    unused: tuple[Unused, ...] = ()  # files and folders of an image folder that are not used
    # Where the training images were resized: canvases of the whole ones (`data.canvas`), for crops.
    whole: images.Images | None = None


def load(name: str, directory: str, image_size: int | None, max_broken: float = 0.0) -> Dataset:
    """Loads a data set.

    The images of folders, Tiny ImageNet, tensorflow-datasets, npy files and uncompressed npz files stay on
    disk and are read on demand; `in_memory` reads them all. imagenet12 is an image folder that the user
    provides, with 12 classes of ImageNet.

    Mean and standard deviation are the published ones if the data set has a name of its own for which there
    are any, and otherwise those of the training images.

    Example:
      >>> dataset = load("fashion_mnist_sample", "data", image_size=None)
      >>> dataset.x_train.shape, dataset.y_test.shape, dataset.class_names[9]
      ((6000, 32, 32, 3), (1000,), 'Ankle boot')

    Args:
      name: One of `NAMES`, or a name of tensorflow-datasets.
      directory: Where the files are, and where official archives are downloaded to. It is not read for
        fashion_mnist_sample.
      image_size: Height and width in pixels. Images that are not square are resized so that their shorter
        side has this length, and cropped at the centre. None keeps the stored size; imagenet12 then has 224
        pixels.
      max_broken: Fraction of a split's images that may fail to decode. These are black.

    Raises:
      UserError: If the name, a folder, a file or a size cannot be used.
    """
    if not isinstance(name, str) or not name:
        raise UserError(f"name: found {name!r}, allowed: a name, such as {', '.join(NAMES)}")
    if not isinstance(directory, str) or not directory or "\0" in directory:
        raise UserError(f"directory: found {directory!r}, allowed: a path")
    if image_size is not None and (
        isinstance(image_size, bool) or not isinstance(image_size, int) or not 1 <= image_size <= MAX_SIZE
    ):
        raise UserError(f"image_size: found {image_size!r}, allowed: None or 1 to {MAX_SIZE}")
    if image_size is None and name == "imagenet12":
        image_size = SIZES[name][1]
    path = user_path("directory", directory)
    try:
        loader = _LOADERS.get(name)
        if loader:
            loaded = loader(name, path, image_size, max_broken)
        else:
            loaded = tfds_sets.load(name, path, image_size, max_broken, NAMES)
        return _dataset(loaded, re.split("[/:]", name)[0], image_size)
    except OSError as error:
        where = error.filename or directory
        raise UserError(f"directory: {where}: {error.strerror or error}") from error


def keeps_whole_images(name: str, image_size: int | None) -> bool:
    """Whether `load` also gives canvases of the whole images, because it resizes them.

    Example:
      >>> keeps_whole_images("cifar10", 32), keeps_whole_images("imagenet12", None)
      (False, True)
    """
    if name in _DECODED or name not in _LOADERS:  # their images may have any size
        return image_size is not None or name == "imagenet12"
    return image_size is not None and image_size != SIZES.get(name, (None, None))[1]


def in_memory(dataset: Dataset) -> Dataset:
    """Reads all images of a data set into memory, except for the canvases of whole ones.

    Raises:
      UserError: If images are damaged, or do not fit into memory.
    """
    return dataset._replace(
        x_train=images.in_memory(dataset.x_train), x_test=images.in_memory(dataset.x_test)
    )


def _dataset(loaded: images.Loaded, name: str, image_size: int | None) -> Dataset:
    """Checks and resizes the images of a loader and adds the statistics, published ones by name."""
    source = loaded.source
    classes = len(loaded.class_names)
    for split, x, y in (
        ("train", loaded.x_train, loaded.y_train),
        ("test", loaded.x_test, loaded.y_test),
    ):
        where = f"{source}: {split}"
        if not len(x):
            raise UserError(f"{where}: no images, at least one is needed")
        if len(x) != len(y):
            raise UserError(f"{where}: {len(x)} images and {len(y)} labels, equal numbers are needed")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= classes:
            found = low if low < 0 else high
            raise UserError(f"{where}: label {found}, allowed: 0 to {classes - 1}")
    missing = sorted(set(range(classes)) - set(np.unique(loaded.y_train).tolist()))
    if missing:
        raise UserError(
            f"{source}: train: no image has label {missing[0]}, all of 0 to {classes - 1} must occur"
        )

    what = f"{source}: image_size {image_size}"
    x_train = images.resize(loaded.x_train, image_size, what)
    if image_size is not None and x_train is not loaded.x_train:
        loaded = loaded._replace(whole=canvas.canvases(loaded.x_train, image_size, what))
    x_test = images.resize(loaded.x_test, image_size, what)
    mean, std = PUBLISHED.get(name) or images.channel_stats(x_train)
    return Dataset(
        x_train,
        loaded.y_train.astype(np.int32),
        x_test,
        loaded.y_test.astype(np.int32),
        loaded.class_names,
        mean,
        std,
        source,
        loaded.unused,
        loaded.whole,
    )
