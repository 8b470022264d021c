"""Features of unaugmented images, and weighted kNN on features, compared with the same in PyTorch.

kNN has the sizes of CIFAR-10 and of ResNet-18's backbone features: 10,000 queries among 50,000, k = 200.

Last results: two cores of an AMD EPYC, jax 0.10.2, torch 2.13.0, 2026-11-23, --repeats=3

                                ours_s  baseline_s  ratio  images_per_s
    features resnet18            5.154       5.886  1.142           194
    features resnet18/16         1.102        1.45  1.316         6,352
    kNN 10,000 in 50,000 x 512   5.297       4.853  0.9161
"""

from collections.abc import Iterator

import jax
import numpy as np

from benchmarks import settings
from benchmarks.results import Result, result
from benchmarks.settings import NARROW, Setting
from benchmarks.timing import Call, medians
from mocosfl_jax.evaluation import knn
from mocosfl_jax.evaluation.features import extract, make_encode

NEEDS = ("torch",)
MEAN = STD = (0.5, 0.5, 0.5)
CLASSES, K, TEMPERATURE = 10, 200, 0.1
BATCH = 250


def pictures(count: int, setting: Setting) -> np.ndarray:
    shape = (count, setting.image_size, setting.image_size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def ours_features(setting: Setting, count: int) -> Call:
    _, algorithm = settings.build(setting)
    state = jax.jit(algorithm.init)(jax.random.key(0))
    encode = make_encode(algorithm, MEAN, STD)
    images = pictures(count, setting)
    return lambda: extract(encode, state, images, BATCH)


def baseline_features(setting: Setting, count: int) -> Call:
    import torch

    from benchmarks import torch_loop

    client, server = (model.to(torch_loop.device()) for model in torch_loop.split_resnet18(setting))
    images = torch.from_numpy(pictures(count, setting)).permute(0, 3, 1, 2)

    @torch.no_grad()
    def call() -> None:
        for batch in images.split(BATCH):
            normalised = (batch.to(torch_loop.device()).float() / 255 - MEAN[0]) / STD[0]
            pooled = server.backbone(client(normalised))
            server.head(pooled).cpu()

    return call


# Training features [n, width] and labels [n], test features and labels.
Sets = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def features_and_labels(train: int, test: int, width: int) -> Sets:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, train + test)
    centres = rng.standard_normal((CLASSES, width), np.float32)
    features = centres[labels] + 4 * rng.standard_normal((train + test, width), np.float32)
    return features[:train], labels[:train], features[train:], labels[train:]


def ours_knn(sets: Sets) -> Call:
    return lambda: knn.knn_accuracy(*sets, num_classes=CLASSES, k=K, temperature=TEMPERATURE)


def baseline_knn(sets: Sets) -> Call:
    """As in the official code: one batch of queries at a time, votes by scatter."""
    import torch
    import torch.nn.functional as F

    from benchmarks import torch_loop

    place = torch_loop.device()
    train, train_labels, test, test_labels = (torch.from_numpy(array).to(place) for array in sets)

    @torch.no_grad()
    def call() -> float:
        rows = F.normalize(train)
        right = 0
        for queries, labels in zip(test.split(BATCH), test_labels.split(BATCH), strict=True):
            similarity, neighbours = (F.normalize(queries) @ rows.T).topk(K, dim=1)
            weights = (similarity / TEMPERATURE).exp()
            votes = torch.zeros(len(queries), CLASSES, device=place).scatter_add_(
                1, train_labels[neighbours], weights
            )
            right += int((votes.argmax(dim=1) == labels).sum())
        return right / len(test)

    return call


def results(repeats: int) -> Iterator[Result]:
    from benchmarks import agreement, torch_loop
    from mocosfl_jax.errors import UserError

    torch_loop.use_all_cores()
    agreement.check()
    for setting, count in ((Setting(), 1000), (NARROW, 7000)):
        seconds = medians(
            {"ours": ours_features(setting, count), "baseline": baseline_features(setting, count)}, repeats
        )
        network = setting.case.split()[0]
        yield result("eval", f"features {network}", seconds, images_per_s=count / seconds["ours"])
    sets = features_and_labels(50_000, 10_000, 512)
    ours, baseline = ours_knn(sets), baseline_knn(sets)
    accuracies = ours(), baseline()
    if not abs(accuracies[0] - accuracies[1]) <= 1e-3:
        raise UserError(f"eval: found kNN accuracies {accuracies}, allowed: a difference of 0.001")
    seconds = medians({"ours": ours, "baseline": baseline}, repeats)
    yield result("eval", "kNN 10,000 in 50,000 x 512", seconds)
