"""What identifies a data set, so that a run resumes, and is evaluated, on the data that it was trained on."""

import hashlib
from collections.abc import Mapping

import numpy as np

from mocosfl_jax.data import Dataset, Images

Fingerprint = Mapping[str, int | str | list[int]]  # plain values, for config.json

_SAMPLE = 64  # images of a split whose pixels count, where they are read from disk on demand


def fingerprint(dataset: Dataset) -> Fingerprint:
    """Counts, shape, class names, labels and pixels of a data set as it was loaded, before `in_memory`.

    The pixels of images in memory count in full. Of images that are read on demand, evenly spaced ones count,
    so that it takes about a second. Neither names nor times of files count, so that a copy of the data is the
    same data.

    Example:
      >>> from mocosfl_jax.data import load
      >>> fingerprint(load("fashion_mnist_sample", "data", image_size=None))["image_shape"]
      [32, 32, 3]
    """
    return {
        "training_images": len(dataset.x_train),
        "test_images": len(dataset.x_test),
        "image_shape": list(dataset.x_train.shape[1:]),
        "class_names": _digest("\0".join(dataset.class_names).encode("utf-8", "surrogatepass")),
        "labels": _digest(dataset.y_train.astype("<i4").tobytes(), dataset.y_test.astype("<i4").tobytes()),
        "pixels": _digest(_pixels(dataset.x_train), _pixels(dataset.x_test)),
    }


def changes(recorded: Fingerprint, found: Fingerprint) -> list[str]:
    """How the data differ from those that were recorded, in words; [] if they are the same.

    Example:
      >>> changes({"training_images": 60, "pixels": "ab"}, {"training_images": 90, "pixels": "cd"})
      ['training images: 60 there, 90 now', 'other pixels']
    """
    lines = []
    for name, now in found.items():
        before = recorded.get(name)
        if before != now:
            words = name.replace("_", " ")
            hashed = isinstance(now, str)
            lines.append(f"other {words}" if hashed else f"{words}: {before} there, {now} now")
    return lines


def _pixels(images: Images) -> np.ndarray:
    if isinstance(images, np.ndarray):
        return images
    count = min(_SAMPLE, len(images))
    return images[np.linspace(0, len(images) - 1, count).astype(int)]


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()[:32]
