"""Small data sets in the layouts of their archives."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from mocosfl_jax.data import (
    cifar_files,
)

ROWS = {"cifar10": (20, 30), "cifar100": (200, 100)}


LABEL_BYTES = {"cifar10": 1, "cifar100": 2}


CLASSES = {"cifar10": 10, "cifar100": 100}


def pictures(count: int, classes: int, seed: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    return x, rng.permutation(np.arange(count) % classes).astype(np.int32)


def shrink(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = tuple(layout._replace(rows=ROWS[name]) for layout in cifar_files.LAYOUTS[name])
    monkeypatch.setitem(cifar_files.LAYOUTS, name, layouts)


def written(name: str) -> dict[str, np.ndarray]:
    layout = cifar_files.LAYOUTS[name][0]
    x_train, y_train = pictures(len(layout.train) * layout.rows[0], CLASSES[name], 0)
    x_test, y_test = pictures(layout.rows[1], CLASSES[name], 1)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def planes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(len(x), -1)


def files(name: str, kind: str, data: dict[str, np.ndarray]) -> dict[str, bytes]:
    """The files of an official folder: `kind` is "binary" or a pickle protocol."""
    layout = cifar_files.LAYOUTS[name][0 if kind == "binary" else 1]
    names = [f"class{label}" for label in range(CLASSES[name])]
    parts = dict(
        zip(
            layout.train,
            zip(
                np.split(data["x_train"], len(layout.train)),
                np.split(data["y_train"], len(layout.train)),
                strict=True,
            ),
            strict=True,
        )
    )
    parts[layout.test] = (data["x_test"], data["y_test"])
    made = {}
    for file, (x, y) in parts.items():
        if kind == "binary":
            label = np.zeros((len(x), LABEL_BYTES[name]), np.uint8)
            label[:, -1] = y
            made[file] = np.concatenate([label, planes(x)], axis=1).tobytes()
        else:
            content = {"batch_label": file, "data": planes(x), layout.label: y.tolist()}
            made[file] = pickle.dumps(content, protocol=int(kind))
    if kind == "binary":
        made[layout.names] = "".join(f"{text}\n" for text in [*names, ""]).encode()
    else:
        made[layout.names] = pickle.dumps({layout.names_key: names, "num_vis": 3072}, protocol=int(kind))
    return made


def pack(path: Path, folder: str, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for file, data in contents.items():
            info = tarfile.TarInfo(f"{folder}/{file}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def unpack(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for file, data in contents.items():
        (folder / file).write_bytes(data)
    return folder


def mat(path: Path, x: np.ndarray, y: np.ndarray, changes: dict[str, Any] | None = None) -> None:
    """Write an official file: X [32, 32, 3, n], y [n, 1] with 10 for the digit 0, compressed."""
    labels = np.where(y == 0, 10, y).astype(np.uint8)[:, None]
    scipy.io.savemat(path, {"X": x.transpose(1, 2, 3, 0), "y": labels} | (changes or {}), do_compression=True)


def write_svhn(folder: Path) -> dict[str, np.ndarray]:
    x_train, y_train = pictures(40, 10, 0)
    x_test, y_test = pictures(20, 10, 1)
    mat(folder / "train_32x32.mat", x_train, y_train)
    mat(folder / "test_32x32.mat", x_test, y_test)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def tiny_files() -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    """The official files with four classes; lossless, so that images can be compared."""
    data = small()
    wnids = ("n01443537", "n01629819", "n01641577", "n09256479")
    made = {
        "wnids.txt": "\n".join(reversed(wnids)).encode(),
        "words.txt": b"n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn09256479\tcoral reef\n",
        "test/images/test_0.JPEG": b"not read",
    }

    def encode(image: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()

    for n, (x, y) in enumerate(zip(data["x_train"], data["y_train"], strict=True)):
        made[f"train/{wnids[y]}/images/{wnids[y]}_{n:02}.JPEG"] = encode(x)
        made[f"train/{wnids[y]}/{wnids[y]}_boxes.txt"] = b"boxes"
    lines = []
    for n, (x, y) in enumerate(zip(data["x_test"], data["y_test"], strict=True)):
        made[f"val/images/val_{n}.JPEG"] = encode(x)
        lines.append(f"val_{n}.JPEG\t{wnids[y]}\t0\t32\t44\t62\n")
    made["val/val_annotations.txt"] = "".join(reversed(lines)).encode()
    order = np.argsort(data["y_train"], kind="stable")
    return data | {"x_train": data["x_train"][order], "y_train": data["y_train"][order]}, made


def write_tree(folder: Path, contents: dict[str, bytes]) -> Path:
    for file, data in contents.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    return folder


def zip_tree(path: Path, contents: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("tiny-imagenet-200")
        for file, data in contents.items():
            archive.writestr(f"tiny-imagenet-200/{file}", data)
    return path


def small(side: int = 8) -> dict[str, np.ndarray]:
    x_train, y_train = pictures(12, 4, 0, side)
    x_test, y_test = pictures(8, 4, 1, side)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def write_folder(root: Path, data: dict[str, np.ndarray], suffix: str = ".png", test: str = "test") -> None:
    for split, folder in (("train", "train"), ("test", test)):
        for index, (image, label) in enumerate(zip(data[f"x_{split}"], data[f"y_{split}"], strict=True)):
            place = root / folder / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index:04}{suffix}")
