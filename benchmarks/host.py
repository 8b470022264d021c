"""What the host does for a pool of many clients: partition, cohort, and the images of an epoch.

50 images for each client, of ten classes, two classes a client; a cohort of 100 with batch 1, 50 steps.
parts_mib is the memory of the indices of all images, which are kept during a run.

Last results: two cores of an AMD EPYC, beside other work, 2026-11-26

                     partition_s   cohort_s  epoch_indices_s  parts_mib
    1000 clients         0.01248  0.0002657         0.002088     0.1907
    10000 clients         0.2253  0.0003258         0.002023      1.907
    100000 clients         2.425  0.0003545         0.002077      19.07
    1000000 clients        26.42  0.0004611         0.006248      190.7
"""

import time
from collections.abc import Iterator

import numpy as np

from benchmarks.results import Result
from mocosfl_jax.feed import partition

NEEDS = ()
POOLS = (1_000, 10_000, 100_000, 1_000_000)
IMAGES, COHORT = 50, 100


def measure(num_clients: int) -> Result:
    """Times the host's work once; the arrays are larger than any cache."""
    labels = np.random.default_rng(0).integers(0, 10, num_clients * IMAGES, np.int32)
    clock = [time.perf_counter()]
    parts = partition.partition(
        labels,
        num_clients=num_clients,
        batch_size=1,
        noniid_ratio=0.2,
        dirichlet_alpha=None,
        seed=0,
    )
    clock.append(time.perf_counter())
    batch_sizes = partition.batch_sizes(num_clients, 1)
    cohort = partition.sample_cohort(num_clients, COHORT, seed=0, epoch=0)
    clock.append(time.perf_counter())
    partition.epoch_indices(parts, cohort, batch_sizes=batch_sizes, steps=IMAGES, seed=0, epoch=0)
    clock.append(time.perf_counter())
    names = ("partition_s", "cohort_s", "epoch_indices_s")
    numbers = dict(zip(names, np.diff(clock).tolist(), strict=True))
    return Result(
        "host", f"{num_clients} clients", numbers | {"parts_mib": sum(p.nbytes for p in parts) / 2**20}
    )


def results(repeats: int) -> Iterator[Result]:
    del repeats
    for num_clients in POOLS:
        yield measure(num_clients)
