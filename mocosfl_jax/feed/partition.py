"""Which images each client holds, and which of them it trains on in each step. NumPy, on the host.

Every function is pure: its random numbers depend only on the seed, the epoch and the client. So a run can
resume without a saved generator, and a client's batches do not depend on the other clients in the cohort.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mocosfl_jax.errors import UserError

# First word of a generator's spawn key, so that the purposes draw from independent streams of one seed.
_PARTITION, _COHORT, _BATCHES = range(3)


class Rich(NamedTuple):
    """Unequal clients: a few rich ones hold much data and train on large batches, the others are poor.

    For 100 clients, the paper's "0.2_0.8|16|0.8_0.2" is `Rich(20, data_fraction=0.8, batch_factor=16)`.
    """

    clients: int  # number of rich clients, the first of the pool; less than N
    data_fraction: float  # fraction of every class's images that the rich hold together; above 0, below 1
    batch_factor: int  # a rich client's batch has batch_factor * batch_size images


def partition(
    labels: np.ndarray,
    *,
    num_clients: int,
    batch_size: int,
    noniid_ratio: float,
    dirichlet_alpha: float | None,
    seed: int,
    rich: Rich | None = None,
) -> list[np.ndarray]:
    """Splits the images of a data set over the client pool.

    There are three schemes:

    - `noniid_ratio` 1.0 (IID): contiguous ranges of a random permutation, whose sizes differ by one at most.
    - `noniid_ratio` r < 1 (label shards): the images are sorted by label and divided into s N label shards,
      s = int(r * classes), of which each client receives s at random (McMahan et al. 2017; Li et al. 2023).
      Every class is divided into a whole number of label shards, so a client holds at most s classes. The
      label shards are equal if the classes are balanced and the number of classes divides s N; otherwise they
      are as equal as the classes permit. With fewer label shards than classes this is impossible: they are
      then equal, and each spans several classes.
    - `dirichlet_alpha` is set (`noniid_ratio` is ignored): the images of each class are split over the
      clients in proportions drawn from Dirichlet(alpha) (Hsu et al. 2019, as in Li et al. 2022). The smaller
      alpha, the farther from IID. Clients with less than one batch are then filled up to one batch with
      random images of the largest client.

    With `rich`, the images of every class are first split at random between the rich and the poor clients,
    and the scheme is then applied to each of the two groups. So label shards span several classes if one
    group alone has fewer label shards than there are classes.

    Example:
      >>> labels = np.arange(600) % 10  # 60 images of each of 10 classes
      >>> parts = partition(
      ...     labels, num_clients=20, batch_size=5, noniid_ratio=0.2, dirichlet_alpha=None, seed=0
      ... )
      >>> {len(part) for part in parts}, max(len(set(labels[part].tolist())) for part in parts)
      ({30}, 2)

    Args:
      labels: [images], integers.
      num_clients: N.
      batch_size: B. Every client gets at least one batch.
      noniid_ratio: Classes of a client / classes of the data set, in (0, 1].
      dirichlet_alpha: From 1e-6 to 1e9, or None.
      seed: Not negative.
      rich: Unequal clients. None: all clients are alike.

    Returns:
      N arrays of int32 indices into `labels`. Every image belongs to exactly one of them.

    Raises:
      UserError: If a value is out of range, or a client would hold less than one of its batches.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels: found {labels.dtype} of shape {labels.shape}, allowed: one integer per image"
        )
    _check_count("num_clients", num_clients)
    _check_count("batch_size", batch_size)
    _check_seed(seed)
    if rich is not None:
        _check_rich(rich, num_clients)
    if num_clients * batch_size > len(labels):
        raise UserError(
            f"num_clients and batch_size: found {num_clients} batches of {batch_size}, "
            f"{num_clients * batch_size} images, allowed: at most {len(labels)}, the images there are"
        )
    rng = _generator(seed, _PARTITION)
    if rich is None:
        parts = _deal(rng, labels, num_clients, batch_size, noniid_ratio, dirichlet_alpha)
        _check_batch(parts, batch_size)
        return [part.astype(np.int32) for part in parts]

    parts = []
    counts = (rich.clients, num_clients - rich.clients)
    sizes = (rich.batch_factor * batch_size, batch_size)
    groups = _rich_and_poor(rng, labels, rich.data_fraction)
    for images, count, size, name in zip(groups, counts, sizes, ("rich", "poor"), strict=True):
        if count * size > len(images):
            raise UserError(
                f"batch_size: found {batch_size}, with rich_batch {rich.batch_factor} and "
                f"rich_data {rich.data_fraction}, and a batch for each of the {count} {name} clients takes "
                f"{count * size} images: they hold {len(images)}"
            )
        dealt = _deal(rng, labels[images], count, size, noniid_ratio, dirichlet_alpha)
        _check_batch(dealt, batch_size, factor=size // batch_size)
        parts += [images[part].astype(np.int32) for part in dealt]
    return parts


def batch_sizes(num_clients: int, batch_size: int, rich: Rich | None = None) -> np.ndarray:
    """The batch size of each client of the pool: [N] int32.

    Example:
      >>> batch_sizes(5, 2, Rich(clients=1, data_fraction=0.8, batch_factor=16)).tolist()
      [32, 2, 2, 2, 2]

    Raises:
      UserError: If a value of `rich` is out of range.
    """
    sizes = np.full(num_clients, batch_size, np.int32)
    if rich is not None:
        _check_rich(rich, num_clients)
        sizes[: rich.clients] *= rich.batch_factor
    return sizes


def rich_in_cohort(num_clients: int, cohort: int, rich: Rich | None) -> int:
    """The number of rich clients in every cohort: their share of the pool times M, rounded.

    At least one client is rich and, if M is more than one, at least one is poor. So the batch sizes are the
    same in every step.
    """
    if rich is None:
        return 0
    _check_rich(rich, num_clients)
    poor = num_clients - rich.clients
    most = min(rich.clients, max(1, cohort - 1))
    return min(most, max(1, cohort - poor, round(cohort * rich.clients / num_clients)))


def sample_cohort(
    num_clients: int, cohort: int, *, seed: int, epoch: int, rich: Rich | None = None
) -> np.ndarray:
    """Draws the cohort of an epoch from the pool, without replacement: [M] int32, sorted.

    Rich and poor clients are drawn separately: the first `rich_in_cohort` clients of every cohort are rich.

    Example:
      >>> cohort = sample_cohort(100, 10, seed=0, epoch=3)
      >>> cohort.shape, len(set(cohort.tolist()))
      ((10,), 10)

    Raises:
      UserError: If the cohort is not in 1..num_clients, or the seed is negative.
    """
    _check_count("num_clients", num_clients)
    _check_count("cohort", cohort)
    _check_seed(seed)
    if cohort > num_clients:
        raise UserError(f"cohort: found {cohort}, allowed: 1 to {num_clients}, the clients of the pool")
    num_rich = rich.clients if rich else 0
    drawn_rich = rich_in_cohort(num_clients, cohort, rich)
    if cohort == num_clients:
        return np.arange(num_clients, dtype=np.int32)
    rng = _generator(seed, _COHORT, epoch)
    drawn = rng.choice(num_rich, drawn_rich, replace=False)
    drawn_poor = num_rich + rng.choice(num_clients - num_rich, cohort - drawn_rich, replace=False)
    return np.sort(np.concatenate([drawn, drawn_poor])).astype(np.int32)


def steps_per_epoch(parts: Sequence[np.ndarray], batch_sizes: np.ndarray) -> int:
    """The number of steps in an epoch, S: enough for the whole pool to process as many images as it holds.

    S = ceil(images / sum of the batch sizes [N]), which is ceil(images / (N B)) if all clients are alike.
    """
    return math.ceil(sum(map(len, parts)) / int(batch_sizes.sum()))


def epoch_indices(
    parts: Sequence[np.ndarray],
    cohort: np.ndarray,
    *,
    batch_sizes: np.ndarray,
    steps: int,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """The images of an epoch: [S, M, B] int32 indices into the data set, where B is the largest batch size.

    Each client shuffles its images and takes them batch by batch. It skips an incomplete last batch and
    shuffles its images again. So clients with fewer images than S batches repeat some images, and others
    leave some out. The places beyond a client's own batch size repeat the first image of its batch.

    Args:
      parts: The image indices of each client of the pool, from `partition`.
      cohort: [M], the clients that take part.
      batch_sizes: [N], the batch size of each client of the pool, from `batch_sizes`.
      steps: S.
      seed: Not negative.
      epoch: Not negative.

    Raises:
      UserError: If a client of the cohort holds less than one of its batches, or the seed is negative.
    """
    _check_seed(seed)
    for batch_size in np.unique(batch_sizes[cohort]):
        _check_batch([parts[client] for client in cohort if batch_sizes[client] == batch_size], batch_size)
    indices = np.empty((steps, len(cohort), int(batch_sizes.max())), np.int32)
    for place, client in enumerate(cohort):
        size = int(batch_sizes[client])
        own = client_indices(parts[client], int(client), size, steps=steps, seed=seed, epoch=epoch)
        indices[:, place, :size] = own
        indices[:, place, size:] = own[:, :1]
    return indices


def client_indices(
    part: np.ndarray, client: int, batch_size: int, *, steps: int, seed: int, epoch: int
) -> np.ndarray:
    """The images of one client in an epoch, [S, B], as dealt by `epoch_indices`.

    Args:
      part: The client's images, at least B of them.
      client: Its number.
      batch_size: B.
      steps: S.
      seed: Not negative.
      epoch: Not negative.
    """
    batches = len(part) // batch_size
    passes = math.ceil(steps / batches)
    rng = _generator(seed, _BATCHES, epoch, client)
    shuffled = rng.permuted(np.tile(part, (passes, 1)), axis=1)
    return shuffled[:, : batches * batch_size].reshape(-1, batch_size)[:steps]


def _rich_and_poor(rng: np.random.Generator, labels: np.ndarray, fraction: float) -> list[np.ndarray]:
    """The images of the rich, `fraction` of every class, and those of the poor, the rest."""
    classes, counts = np.unique(labels, return_counts=True)
    # The total must be right too: classes that lose most by rounding down get one more image.
    exact = fraction * counts
    taken = np.floor(exact).astype(np.int64)
    missing = round(fraction * len(labels)) - int(taken.sum())
    taken[np.argsort(taken - exact, kind="stable")[:missing]] += 1
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in classes]
    return [
        np.concatenate([images[:count] for images, count in zip(shuffled, taken, strict=True)]),
        np.concatenate([images[count:] for images, count in zip(shuffled, taken, strict=True)]),
    ]


def _deal(
    rng: np.random.Generator,
    labels: np.ndarray,
    num_clients: int,
    batch_size: int,
    noniid_ratio: float,
    dirichlet_alpha: float | None,
) -> list[np.ndarray]:
    if dirichlet_alpha is not None:
        return _dirichlet(rng, labels, num_clients, batch_size, dirichlet_alpha)
    if not 0 < noniid_ratio <= 1:
        raise UserError(f"noniid_ratio: found {noniid_ratio}, allowed: more than 0, at most 1")
    if noniid_ratio == 1:
        return np.array_split(rng.permutation(len(labels)), num_clients)
    return _shards(rng, labels, num_clients, noniid_ratio)


def _shards(rng: np.random.Generator, labels: np.ndarray, num_clients: int, ratio: float) -> list[np.ndarray]:
    classes, counts = np.unique(labels, return_counts=True)
    # Without the small number, 0.29 * 100 would give 28.
    shards_per_client = int(ratio * len(classes) + 1e-9)
    if shards_per_client < 1:
        raise UserError(
            f"noniid_ratio: found {ratio}, allowed: {1 / len(classes):.4g} or more (one of "
            f"{len(classes)} classes per client)"
        )
    num_shards = num_clients * shards_per_client
    # A stable sort of a permutation assigns the images of a class to its shards at random.
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    if num_shards < len(classes):
        shards = np.array_split(by_label, num_shards)
    else:
        # Give each further shard to the class whose shards are the largest.
        shards_per_class = np.ones(len(classes), np.int64)
        for _ in range(num_shards - len(classes)):
            shards_per_class[np.argmax(counts / shards_per_class)] += 1
        of_class = np.split(by_label, np.cumsum(counts)[:-1])
        shards = [
            shard
            for images, pieces in zip(of_class, shards_per_class, strict=True)
            for shard in np.array_split(images, pieces)
        ]
    dealt = rng.permutation(num_shards).reshape(num_clients, shards_per_client)
    return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


def _dirichlet(
    rng: np.random.Generator, labels: np.ndarray, num_clients: int, batch_size: int, alpha: float
) -> list[np.ndarray]:
    # Below these bounds proportions underflow to 0 / 0. Above them they are equal to within one image anyway.
    if not 1e-6 <= alpha <= 1e9:
        raise UserError(f"dirichlet_alpha: found {alpha}, allowed: 1e-6 to 1e9")
    pieces: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(images)).astype(np.int64)
        for client, piece in enumerate(np.split(images, cuts)):
            pieces[client].append(piece)
    parts = [rng.permutation(np.concatenate(piece)) for piece in pieces]

    # The usual way, drawing again until every client has a batch, may never end. This loop ends: there are at
    # least N B images, so while one client lacks images the largest client has images to spare, and each
    # transfer brings one of the two to exactly one batch.
    sizes = np.array([len(part) for part in parts])
    while sizes.min() < batch_size:
        poor, rich = sizes.argmin(), sizes.argmax()
        moved = min(batch_size - sizes[poor], sizes[rich] - batch_size)
        parts[poor] = np.concatenate([parts[poor], parts[rich][-moved:]])
        parts[rich] = parts[rich][:-moved]
        sizes[poor] += moved
        sizes[rich] -= moved
    return parts


def _generator(seed: int, *position: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=position))


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name}: found {value}, allowed: an integer of 1 or more")


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"seed: found {seed}, allowed: an integer of 0 or more")


def _check_rich(rich: Rich, num_clients: int) -> None:
    _check_count("rich.clients", rich.clients)
    _check_count("rich.batch_factor", rich.batch_factor)
    if rich.clients >= num_clients:
        raise UserError(f"rich.clients: found {rich.clients}, allowed: less than {num_clients}, num_clients")
    if not 0 < rich.data_fraction < 1:
        raise UserError(f"rich.data_fraction: found {rich.data_fraction}, allowed: more than 0, less than 1")


def _check_batch(parts: Sequence[np.ndarray], batch_size: int, factor: int = 1) -> None:
    """Raise UserError if a client has fewer images than a batch, of `factor` times `batch_size`."""
    smallest = min(map(len, parts))
    if factor > 1 and smallest < factor * batch_size:
        raise UserError(
            f"batch_size: found {batch_size}, with rich_batch {factor}, and the smallest of {len(parts)} "
            f"rich clients holds {smallest} images, fewer than a batch of {factor * batch_size}"
        )
    if smallest < batch_size:
        raise UserError(
            f"batch_size: found {batch_size}, allowed: 1 to {smallest} (the smallest of "
            f"{len(parts)} clients holds no more images; a smaller number of clients gives them more)"
        )
