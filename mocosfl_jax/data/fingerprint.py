"""What identifies a data set, so that a run resumes, and is evaluated, on the data that it was trained on."""

import hashlib
from collections.abc import Mapping

import numpy as np

from mocosfl_jax.data import Dataset, Images

Fingerprint = Mapping[str, int | str | list[int]]  # plain values, for config.json

SAMPLED = "sampled_pixels"  # the field for images that may be read on demand, as on the other side
_SAMPLE = 64  # images of a split whose pixels count, where they are read from disk on demand


def fingerprint(dataset: Dataset) -> Fingerprint:
    """Counts, shape, class names, labels and pixels of a data set as it was loaded, before `in_memory`.

    The pixels of images in memory count in full. Of images that are read on demand, evenly spaced ones count,
    so that it takes about a second. Those are also a field of their own, so that images in memory can be
    compared with images on disk. Neither names nor times of files count, so that a copy of the data is the
    same data.

    Example:
      >>> from mocosfl_jax.data import load
      >>> fingerprint(load("fashion_mnist_sample", "data", image_size=None))["image_shape"]
      [32, 32, 3]
    """
    splits = dataset.x_train, dataset.x_test
    samples = [_sample(images) for images in splits]
    known = [
        images if isinstance(images, np.ndarray) else some
        for images, some in zip(splits, samples, strict=True)
    ]
    return {
        "training_images": len(dataset.x_train),
        "test_images": len(dataset.x_test),
        "image_shape": list(dataset.x_train.shape[1:]),
        "class_names": _digest("\0".join(dataset.class_names).encode("utf-8", "surrogatepass")),
        "labels": _digest(dataset.y_train.astype("<i4").tobytes(), dataset.y_test.astype("<i4").tobytes()),
        "pixels": _digest(*known),
        SAMPLED: _digest(*samples),
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
        if name.endswith(SAMPLED) or (name.endswith("pixels") and _same_sample(recorded, found, name)):
            continue
        if before != now:
            words = name.replace("_", " ")
            hashed = isinstance(now, str)
            lines.append(f"other {words}" if hashed else f"{words}: {before} there, {now} now")
    return lines


def _same_sample(recorded: Fingerprint, found: Fingerprint, name: str) -> bool:
    """Whether no more than a sample of the pixels is known on one side, and it is the same on the other."""
    sampled = name.replace("pixels", SAMPLED)
    # Earlier versions recorded only `pixels`, of the sample if they were on disk.
    (before, some_before), (now, some_now) = (
        (each.get(name), each.get(sampled, each.get(name))) for each in (recorded, found)
    )
    return some_before == some_now and (before == some_before or now == some_now)


def _sample(images: Images) -> np.ndarray:
    count = min(_SAMPLE, len(images))
    return images[np.linspace(0, len(images) - 1, count).astype(int)]


def _digest(*parts: bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()[:32]
