"""Which images each client holds, and which of them it trains on at each step. NumPy, on the host.

Every function is pure: its random numbers follow from its seed, the epoch and the client alone. So a run that
resumes needs no saved generator, and a client draws the same batches whoever else is in the cohort.
"""

import math
from collections.abc import Sequence

import numpy as np

from mocosfl_jax.errors import UserError

# First word of a generator's spawn key: streams of one seed that share no numbers.
_PARTITION, _COHORT, _BATCHES = range(3)


def partition(
    labels: np.ndarray,
    *,
    num_clients: int,
    batch_size: int,
    noniid_ratio: float,
    dirichlet_alpha: float | None,
    seed: int,
) -> list[np.ndarray]:
    """Splits a data set over the client pool.

    - `noniid_ratio` 1.0, IID: contiguous ranges of a random permutation, of sizes that differ by one at most.
    - `noniid_ratio` r < 1, shards: the images sorted by label are cut into s N shards, s = int(r * classes),
      and each client is dealt s of them at random (McMahan et al. 2017; Li et al. 2023). Every class is cut
      into a whole number of shards, so a client holds at most s classes. The shards are equal where the
      classes are balanced and their number divides s N, and else as equal as the classes permit. With fewer
      shards than classes no such cut exists: the shards are then equal and span several classes each.
    - `dirichlet_alpha` set (`noniid_ratio` is not used): the images of each class are split over the clients
      in shares drawn from Dirichlet(alpha) (Hsu et al. 2019, as in Li et al. 2022). Small alpha is far from
      IID. Clients with less than a batch are then filled up to one with random images of the largest client.

    Args:
      labels: [images], integers.
      num_clients: N.
      batch_size: B; every client gets at least one batch.
      noniid_ratio: classes of a client / classes, in (0, 1].
      dirichlet_alpha: above 0, or None.
      seed: not negative.

    Returns:
      N arrays of int32 indices into `labels`. No image is in two of them, none is left out.

    Raises:
      UserError: a value out of range, or a client that would hold less than a batch.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels: found {labels.dtype} of shape {labels.shape}; one integer an image is needed"
        )
    _check_count("config.clients.num", num_clients)
    _check_count("config.clients.batch_size", batch_size)
    _check_seed(seed)
    if num_clients * batch_size > len(labels):
        raise UserError(
            f"config.clients.num={num_clients} with config.clients.batch_size={batch_size}: one batch a "
            f"client takes {num_clients * batch_size} images, the data set has {len(labels)}"
        )
    rng = _generator(seed, _PARTITION)
    if dirichlet_alpha is not None:
        parts = _dirichlet(rng, labels, num_clients, batch_size, dirichlet_alpha)
    elif not 0 < noniid_ratio <= 1:
        raise UserError(f"config.clients.noniid_ratio={noniid_ratio}: must be above 0 and at most 1")
    elif noniid_ratio == 1:
        parts = np.array_split(rng.permutation(len(labels)), num_clients)
    else:
        parts = _shards(rng, labels, num_clients, noniid_ratio)
    _check_batch(parts, batch_size)
    return [part.astype(np.int32) for part in parts]


def sample_cohort(num_clients: int, cohort: int, *, seed: int, epoch: int) -> np.ndarray:
    """Draws the cohort of an epoch from the pool, without replacement: sorted int32 [M].

    Raises:
      UserError: cohort not in 1..num_clients.
    """
    _check_count("config.clients.num", num_clients)
    _check_count("config.clients.cohort", cohort)
    _check_seed(seed)
    if cohort > num_clients:
        raise UserError(f"config.clients.cohort={cohort}: at most config.clients.num={num_clients}")
    if cohort == num_clients:
        return np.arange(num_clients, dtype=np.int32)
    drawn = _generator(seed, _COHORT, epoch).choice(num_clients, cohort, replace=False)
    return np.sort(drawn).astype(np.int32)


def steps_per_epoch(parts: Sequence[np.ndarray], batch_size: int) -> int:
    """Steps of an epoch, S: the whole pool would pass as many images as it holds, ceil(images / (N B))."""
    _check_count("config.clients.batch_size", batch_size)
    return math.ceil(sum(map(len, parts)) / (len(parts) * batch_size))


def epoch_indices(
    parts: Sequence[np.ndarray], cohort: np.ndarray, *, batch_size: int, steps: int, seed: int, epoch: int
) -> np.ndarray:
    """The images of an epoch: int32 [S, M, B], indices into the data set.

    Each client shuffles its images and takes them batch by batch; an incomplete last batch is skipped, and
    the images are shuffled again. So clients with less than S B images repeat some, others leave some out.

    Args:
      parts: indices of each client of the pool, from `partition`.
      cohort: [M], the clients that take part.
      batch_size: B.
      steps: S.
      seed, epoch: not negative.

    Raises:
      UserError: a client of the cohort holds less than a batch.
    """
    _check_count("config.clients.batch_size", batch_size)
    _check_seed(seed)
    _check_batch([parts[client] for client in cohort], batch_size)
    indices = np.empty((steps, len(cohort), batch_size), np.int32)
    for place, client in enumerate(cohort):
        part = parts[client]
        batches = len(part) // batch_size
        passes = math.ceil(steps / batches)
        rng = _generator(seed, _BATCHES, epoch, int(client))
        shuffled = rng.permuted(np.tile(part, (passes, 1)), axis=1)
        indices[:, place] = shuffled[:, : batches * batch_size].reshape(-1, batch_size)[:steps]
    return indices


def _shards(rng: np.random.Generator, labels: np.ndarray, num_clients: int, ratio: float) -> list[np.ndarray]:
    classes, counts = np.unique(labels, return_counts=True)
    # 0.29 * 100 is 28.999...
    shards_per_client = int(ratio * len(classes) + 1e-9)
    if shards_per_client < 1:
        raise UserError(
            f"config.clients.noniid_ratio={ratio}: less than one of {len(classes)} classes a client; "
            f"at least {1 / len(classes):.4g} is needed"
        )
    num_shards = num_clients * shards_per_client
    # A stable sort of a permutation, so that which images of a class share a shard is random.
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    if num_shards < len(classes):
        shards = np.array_split(by_label, num_shards)
    else:
        # Each next shard goes to the class whose shards are the largest.
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
    # Beyond these bounds shares underflow to 0 / 0, or are equal to the last image anyway.
    if not 1e-6 <= alpha <= 1e9:
        raise UserError(f"config.clients.dirichlet_alpha={alpha}: must be from 1e-6 to 1e9")
    pieces: list[list[np.ndarray]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        images = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(images)).astype(np.int64)
        for client, piece in enumerate(np.split(images, cuts)):
            pieces[client].append(piece)
    parts = [rng.permutation(np.concatenate(piece)) for piece in pieces]

    # To draw again until every client has a batch, as is usual, may never end. This does: there are at least
    # N B images, so while a client lacks some the largest can spare some; a transfer settles one of the two.
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
        raise UserError(f"{name}={value}: must be an integer of at least 1")


def _check_seed(seed: int) -> None:
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise UserError(f"config.seed={seed}: must be an integer of at least 0")


def _check_batch(parts: Sequence[np.ndarray], batch_size: int) -> None:
    smallest = min(map(len, parts))
    if smallest < batch_size:
        raise UserError(
            f"config.clients.batch_size={batch_size}: the smallest of {len(parts)} clients has {smallest} "
            f"images; use a batch of at most that, or a smaller config.clients.num"
        )
