"""Views of 32x32 images, compared with the official pipeline: torchvision on PIL images, in one process.

Both make two views of every image of a step: crop, colour jitter, grayscale, blur (v2), flip, normalise.

Last results: two cores of an AMD EPYC, jax 0.10.2, torch 2.13.0, 2026-11-23, --repeats=7

                    ours_s  baseline_s  ratio  ours_views_per_s  baseline_views_per_s
    v1 100 images   0.006362     0.08928  14.03            31,440                 2,240
    v2 100 images   0.006657     0.09427  14.16            30,040                 2,122
    v2 1000 images  0.07449      0.9834   13.2            26,850                 2,034
"""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from benchmarks import settings
from benchmarks.results import Result, result
from benchmarks.timing import Call, finished, medians
from mocosfl_jax import two_views
from mocosfl_jax.parallel import mesh as meshes

NEEDS = ("torch", "torchvision")
SIZE = 32
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's
CASES = (("v1", 100), ("v2", 100), ("v2", 1000))  # version, number of images


def pictures(count: int) -> np.ndarray:
    """[count, 32, 32, 3] uint8."""
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


def ours(version: str, count: int) -> Call:
    make_views = jax.jit(partial(two_views, size=SIZE, mean=MEAN, std=STD, version=version))
    place = meshes.of_clients(settings.mesh(), count)
    return finished(make_views, jax.random.key(0), jax.device_put(pictures(count)[:, None], place))


def baseline(version: str, count: int) -> Call:
    import torch
    from PIL import Image, ImageFilter
    from torchvision import transforms

    rng = np.random.default_rng(0)

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=rng.uniform(0.1, 2.0)))

    steps = [
        transforms.RandomResizedCrop(SIZE, scale=(0.08, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        *([transforms.RandomApply([blur], p=0.5)] if version == "v2" else []),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    view = transforms.Compose(steps)
    images = [Image.fromarray(picture) for picture in pictures(count)]
    return lambda: [torch.stack([view(image) for image in images]) for _ in range(2)]


def results(repeats: int) -> Iterator[Result]:
    from benchmarks import torch_loop

    torch_loop.use_all_cores()
    for version, count in CASES:
        seconds = medians({"ours": ours(version, count), "baseline": baseline(version, count)}, repeats)
        views_per_s = {f"{name}_views_per_s": 2 * count / value for name, value in seconds.items()}
        yield result("augment", f"{version} {count} images", seconds, **views_per_s)
