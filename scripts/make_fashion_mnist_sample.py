"""Writes the bundled sample of Fashion-MNIST, `mocosfl_jax/data/fashion_mnist_sample.npz`.

    python scripts/make_fashion_mnist_sample.py FOLDER

FOLDER holds the four original files, `train-images-idx3-ubyte.gz` and so on, compressed or not. The Debian
package `dataset-fashion-mnist` installs them in `/usr/share/datasets/fashion-mnist`. The sample consists of
the first 600 training images and the first 100 test images of each class, in random order. The same files
give the same arrays and, with the same version of zlib, the same bytes.
"""

import argparse
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np

_TARGET = Path(__file__).parent.parent / "mocosfl_jax" / "data" / "fashion_mnist_sample.npz"
_CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_SPLITS = {"train": ("train", 600), "test": ("t10k", 100)}
_SEED = 0


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Reads an idx file of bytes: two zeros, type 8, rank, sizes (big-endian int32), values."""
    packed = folder / f"{name}.gz"
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    rank = data[3]
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{folder / name}: not an idx file of bytes")
    shape = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def sample(images: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images of each class and their labels, shuffled."""
    chosen = np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(_CLASS_NAMES))])
    chosen = chosen[np.random.default_rng(_SEED).permutation(len(chosen))]
    return images[chosen], labels[chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bundled sample of Fashion-MNIST.")
    parser.add_argument("folder", type=Path, help="folder with the four original files")
    parser.add_argument("--out", type=Path, default=_TARGET)
    arguments = parser.parse_args()

    arrays: dict[str, np.ndarray] = {"class_names": np.array(_CLASS_NAMES)}
    for split, (prefix, count) in _SPLITS.items():
        images = read_idx(arguments.folder, f"{prefix}-images-idx3-ubyte")
        labels = read_idx(arguments.folder, f"{prefix}-labels-idx1-ubyte")
        arrays[f"x_{split}"], arrays[f"y_{split}"] = sample(images, labels, count)

    with zipfile.ZipFile(arguments.out, "w") as archive:
        for name, array in sorted(arrays.items()):
            contents = io.BytesIO()
            np.lib.format.write_array(contents, array, allow_pickle=False)
            # A fixed date keeps the bytes reproducible; numpy.savez would write the current time.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            archive.writestr(info, contents.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
