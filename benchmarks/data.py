"""Epochs of a narrow network on images streamed from the host, compared with resident images.

The images are random: npy files of 32 pixels, which are memory-mapped, and JPEG files of 224 pixels, which
are decoded and resized to 32. waiting_share is the fraction of a streamed epoch in which the device waits for
images. It is an
upper bound: the benchmark waits for every step before it asks for the next images, whereas training does not.
baseline_waiting_share is the same for resident images, which are gathered on the device.

Last results: two cores of an AMD EPYC, jax 0.10.2, torch 2.13.0, 2026-11-23, --repeats=3

                 ours_s  baseline_s  ratio  waiting_share  baseline_waiting_share  images_per_s
    npy 32 px     3.306       3.038  0.9189       0.009669                 0.00455         604.9
    JPEG 224 px   4.069       3.185  0.7828       0.009647                0.003825         491.5
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks import settings
from benchmarks.results import Result, result
from mocosfl_jax.algorithm.interface import CohortState
from mocosfl_jax.training import loop, rounds, saving
from mocosfl_jax.training.checkpoint import Progress

NEEDS = ()
IMAGES, CLASSES = 2000, 10  # 20 steps of 100 images


class Epoch(NamedTuple):
    seconds: float
    waiting: float  # seconds of these in which the device waits for images


def write_npy(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("test", CLASSES)):
        np.save(folder / f"x_{split}.npy", rng.integers(0, 256, (count, 32, 32, 3), np.uint8))
        np.save(folder / f"y_{split}.npy", np.arange(count) % CLASSES)


def write_jpegs(folder: Path) -> None:
    """Writes enlarged noise of 28 x 28 pixels, whose files are about as large as those of photographs."""
    rng = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("test", CLASSES)):
        for number in range(count):
            place = folder / split / str(number % CLASSES)
            place.mkdir(parents=True, exist_ok=True)
            blocks = rng.integers(0, 256, (28, 28, 3), np.uint8)
            image = Image.fromarray(blocks).resize((224, 224), Image.Resampling.BICUBIC)
            image.save(place / f"{number:05}.jpg", quality=90)


def make_epochs(name: str, folder: Path, resident: bool, count: int) -> Iterator[Epoch]:
    """Trains one epoch for each item of the iterator, at most `count`."""
    config = settings.narrow_run()
    config.epochs, config.data.name, config.data.dir = count, name, str(folder)
    config.data.image_size, config.data.resident = 32, resident
    run, state, compiled = settings.prepare(config)
    waiting = [0.0]

    def run_steps(state: CohortState, pieces: Iterable[jax.Array]) -> tuple[CohortState, rounds.Curve]:
        curves: list[rounds.Curve] = []
        images = iter(pieces)
        while True:
            start = time.perf_counter()
            piece = jax.block_until_ready(next(images, None))
            waiting[0] += time.perf_counter() - start
            if piece is None:
                return state, rounds.joined(curves)
            state, curve = jax.block_until_ready(compiled.run_steps(state, [piece]))
            curves.append(curve)

    programs = compiled._replace(run_steps=run_steps)
    progress, store = Progress(), saving.Store(folder, run.replay)  # never written to
    with tqdm(disable=True) as bar:
        for _ in range(count):
            waiting[0], start = 0.0, time.perf_counter()
            state, progress, _ = loop.run_epoch(run, programs, state, progress, store, lambda: False, bar)
            progress = progress._replace(losses=(), top1s=(), epoch_seconds=0.0)
            yield Epoch(time.perf_counter() - start, waiting[0])


def measure(case: str, name: str, write: Callable[[Path], None], repeats: int) -> Result:
    """Medians over `repeats` epochs of each kind, which take turns after one warm-up epoch of each."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        streamed, resident = (make_epochs(name, Path(folder), kept, repeats + 1) for kept in (False, True))
        pairs = list(zip(streamed, resident, strict=True))[1:]
    ours, baseline = zip(*pairs, strict=True)
    seconds = {"ours": median(e.seconds for e in ours), "baseline": median(e.seconds for e in baseline)}
    return result(
        "data",
        case,
        seconds,
        waiting_share=median(e.waiting / e.seconds for e in ours),
        baseline_waiting_share=median(e.waiting / e.seconds for e in baseline),
        images_per_s=IMAGES / seconds["ours"],
    )


def results(repeats: int) -> Iterator[Result]:
    with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results only
        measured = measure("npy 32 px", "npy", write_npy, repeats)
    yield measured
    with contextlib.redirect_stdout(io.StringIO()):
        measured = measure("JPEG 224 px", "image_folder", write_jpegs, repeats)
    yield measured
