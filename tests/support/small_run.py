"""The small run in the tests of the commands: its images, its command line, its metrics."""

import json
import pathlib

import numpy as np

CLASSES, PER_CLASS = 4, 12  # of the small run's images


def write_images(path: pathlib.Path, shape: tuple[int, int, int]) -> str:
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (CLASSES, 1, 1, 3))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(CLASSES), count)
        pictures = colours[labels] + rng.integers(-40, 40, (len(labels), *shape))
        return pictures.astype(np.uint8), labels

    (x_train, y_train), (x_test, y_test) = draw(PER_CLASS), draw(3)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(path)


def arguments(images: str, workdir: pathlib.Path, *more: str) -> list[str]:
    fields = {
        "epochs": 3,
        "data.name": "npz",
        "data.dir": images,
        "clients.num": 4,
        "clients.batch_size": 2,
        "clients.noniid_ratio": 0.5,
        "sync.frequency": 3,
        "model.name": "resnet18",  # which takes images of any size
        "model.stem_stride": 2,
        "model.width": 4,
        "moco.symmetric": True,
        "moco.key_dim": 8,
        "moco.queue_size": 20,
        "eval.every": 1,
        "eval.knn_k": 5,
        "eval.probe_epochs": 3,
        "mesh.data": 1,
        "mesh.model": 1,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["train", *overrides, f"--workdir={workdir}", *more]


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """All lines without the speed, which differs from run to run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]
