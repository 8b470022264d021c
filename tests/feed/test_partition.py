"""Each image is dealt at most once; each client fills a batch; batches depend on (seed, epoch, client)."""

import time
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.feed.partition import (
    Rich,
    batch_sizes,
    epoch_indices,
    partition,
    rich_in_cohort,
    sample_cohort,
    steps_per_epoch,
)

BALANCED = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
UNBALANCED = np.random.default_rng(1).choice(10, 6000, p=np.arange(1, 11) / 55)


def split(labels: np.ndarray = BALANCED, **fields: Any) -> list[np.ndarray]:
    settings: dict[str, Any] = dict(
        num_clients=20, batch_size=4, noniid_ratio=1.0, dirichlet_alpha=None, seed=0
    )
    return partition(labels, **(settings | fields))


def histograms(parts: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(labels[part], minlength=10) for part in parts])


@pytest.mark.parametrize("labels", [BALANCED, UNBALANCED], ids=["balanced", "unbalanced"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_clients": 7, "batch_size": 857},
        {"noniid_ratio": 0.2},
        {"noniid_ratio": 0.5, "num_clients": 37},
        {"noniid_ratio": 0.1, "num_clients": 3},
        {"dirichlet_alpha": 0.01},
        {"dirichlet_alpha": 0.5, "batch_size": 300},
        {"dirichlet_alpha": 100.0},
    ],
    ids=str,
)
def test_clients_partition_the_data_set(labels: np.ndarray, seed: int, fields: dict[str, Any]) -> None:
    parts = split(labels, seed=seed, **fields)
    assert len(parts) == fields.get("num_clients", 20)
    assert all(part.dtype == np.int32 and len(part) >= fields.get("batch_size", 4) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for part, again in zip(parts, split(labels, seed=seed, **fields), strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("fields", [{}, {"noniid_ratio": 0.2}, {"dirichlet_alpha": 1.0}], ids=str)
def test_another_seed_gives_another_split(fields: dict[str, Any]) -> None:
    first, second = split(seed=0, **fields), split(seed=1, **fields)
    assert any(set(one) != set(other) for one, other in zip(first, second, strict=True))


def test_iid_clients_are_near_equal_and_look_like_the_data_set() -> None:
    parts = split(num_clients=7)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    expected = np.array(sizes)[:, None] / 10
    chi_squared = np.sum((histograms(parts, BALANCED) - expected) ** 2 / expected)
    # 6 x 9 degrees of freedom: mean 54, standard deviation 10.
    assert 20 < chi_squared < 105


@pytest.mark.parametrize(("ratio", "most"), [(0.1, 1), (0.2, 2), (0.3, 3), (0.29999, 2), (0.7, 7), (0.95, 9)])
@pytest.mark.parametrize("labels", [BALANCED, UNBALANCED], ids=["balanced", "unbalanced"])
def test_a_client_has_at_most_its_share_of_the_classes(labels: np.ndarray, ratio: float, most: int) -> None:
    for num_clients in (20, 33):
        classes = (histograms(split(labels, noniid_ratio=ratio, num_clients=num_clients), labels) > 0).sum(1)
        assert classes.max() <= most
        if most <= 3:  # few enough that some client is dealt this many
            assert classes.max() == most


def test_the_share_of_classes_has_no_rounding_error() -> None:
    # In binary, 0.29 * 100 is 28.999999999999996.
    labels = np.repeat(np.arange(100), 58)
    parts = split(labels, noniid_ratio=0.29, num_clients=100)
    # 29 shards of two images; with 28 shards, some would have three.
    assert {len(part) for part in parts} == {58}


def test_shards_of_balanced_classes_are_equal() -> None:
    parts = split(noniid_ratio=0.2, num_clients=20)
    assert {len(part) for part in parts} == {300}
    # 40 shards of 150 images: each client has 150 images of each of two classes, or 300 of one.
    assert set(np.unique(histograms(parts, BALANCED))) <= {0, 150, 300}
    assert sum(len(np.unique(BALANCED[part])) for part in parts) > 20  # dealt at random


def test_fewer_shards_than_classes_span_classes() -> None:
    parts = split(noniid_ratio=0.2, num_clients=2)
    assert {len(part) for part in parts} == {3000}


def test_large_alpha_is_nearly_iid_and_small_alpha_is_not() -> None:
    even = histograms(split(dirichlet_alpha=1e6), BALANCED)
    assert even.min() >= 28 and even.max() <= 32  # 600 images over 20 clients
    uneven = histograms(split(dirichlet_alpha=0.02, batch_size=1), BALANCED)
    # Few classes have more than three clients with a tenth of their images; IID, none would have even one.
    assert np.median((uneven >= 60).sum(axis=0)) <= 3
    assert np.median(uneven.max(axis=1) / uneven.sum(axis=1)) > 0.7


def test_class_shares_have_the_dirichlet_distribution() -> None:
    alpha, clients = 0.5, 20
    shares = np.concatenate(
        [histograms(split(dirichlet_alpha=alpha, batch_size=1, seed=seed), BALANCED) for seed in range(40)]
    )
    variance = np.var(shares / 600)
    # One coordinate of a Dirichlet distribution. The estimate has a standard deviation of 2 %.
    expected = (1 / clients) * (1 - 1 / clients) / (clients * alpha + 1)
    assert variance == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_clients": 0}, "num_clients: found 0, allowed"),
        ({"num_clients": 2.5}, "num_clients: found 2.5, allowed"),
        ({"batch_size": 0}, "batch_size: found 0, allowed"),
        ({"num_clients": 6001, "batch_size": 1}, "6001 images, allowed: at most 6000"),
        ({"num_clients": 10, "batch_size": 601}, "6010 images, allowed: at most 6000"),
        (
            {"noniid_ratio": 0.2, "num_clients": 7, "batch_size": 700},
            "batch_size: found 700, allowed: 1 to 600 (the smallest of 7 clients",
        ),
        ({"noniid_ratio": 0.05}, "noniid_ratio: found 0.05, allowed: 0.1 or more"),
        ({"noniid_ratio": 0.0}, "noniid_ratio: found 0.0, allowed"),
        ({"noniid_ratio": 1.1}, "noniid_ratio: found 1.1, allowed"),
        ({"noniid_ratio": float("nan")}, "noniid_ratio: found nan, allowed"),
        ({"dirichlet_alpha": 0.0}, "dirichlet_alpha: found 0.0, allowed"),
        ({"dirichlet_alpha": float("nan")}, "dirichlet_alpha: found nan, allowed"),
        ({"dirichlet_alpha": float("inf")}, "dirichlet_alpha: found inf, allowed"),
        ({"dirichlet_alpha": 0.1, "batch_size": 301}, "6020 images, allowed: at most 6000"),
        ({"seed": -1}, "seed: found -1, allowed"),
        ({"labels": np.zeros((3, 2), int)}, "labels: found"),
        ({"labels": np.zeros(3)}, "labels: found"),
    ],
    ids=str,
)
def test_impossible_splits_say_why_in_one_line(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as raised:
        split(**fields)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_the_hardest_dirichlet_split_terminates() -> None:
    # Every client must end with exactly one batch, although its shares are nearly all zero.
    start = time.process_time()
    parts = split(np.repeat(np.arange(10), 5000), num_clients=1000, batch_size=50, dirichlet_alpha=1e-6)
    assert {len(part) for part in parts} == {50}
    assert time.process_time() - start < 5


def test_cohorts() -> None:
    np.testing.assert_array_equal(sample_cohort(5, 5, seed=0, epoch=3), np.arange(5))
    drawn = np.stack([sample_cohort(10, 3, seed=0, epoch=epoch) for epoch in range(2000)])
    assert drawn.dtype == np.int32
    assert (np.diff(drawn, axis=1) > 0).all()  # sorted, without duplicates
    np.testing.assert_array_equal(drawn[7], sample_cohort(10, 3, seed=0, epoch=7))
    assert not np.array_equal(drawn[:50], [sample_cohort(10, 3, seed=1, epoch=epoch) for epoch in range(50)])
    # Each client is drawn 600 times, +- 20.
    counts = np.bincount(drawn.ravel(), minlength=10)
    assert abs(counts - 600).max() < 80
    for cohort in (0, 11):
        with pytest.raises(UserError, match=f"cohort: found {cohort}, allowed"):
            sample_cohort(10, cohort, seed=0, epoch=0)


@pytest.mark.parametrize(("sizes", "batch_size", "steps"), [([6, 6], 3, 2), ([5, 8], 3, 3), ([1] * 7, 1, 1)])
def test_steps_per_epoch(sizes: list[int], batch_size: int, steps: int) -> None:
    assert steps_per_epoch([np.arange(size) for size in sizes], batch_sizes(len(sizes), batch_size)) == steps


def test_an_epoch_passes_each_image_once_when_batches_fit() -> None:
    parts = split(num_clients=10, noniid_ratio=0.2)
    cohort = np.array([1, 4, 9])
    indices = epoch_indices(parts, cohort, batch_sizes=batch_sizes(10, 4), steps=300, seed=0, epoch=0)
    assert indices.shape == (300, 3, 4) and indices.dtype == np.int32
    for place, client in enumerate(cohort):
        for one_pass in (indices[:150, place], indices[150:, place]):
            np.testing.assert_array_equal(np.sort(one_pass.ravel()), np.sort(parts[client]))
    assert not np.array_equal(indices[:150], indices[150:])


def test_an_incomplete_batch_is_skipped_and_the_images_reshuffled() -> None:
    part = np.arange(100, 111, dtype=np.int32)
    indices = epoch_indices(
        [part], np.array([0]), batch_sizes=batch_sizes(1, 4), steps=2000, seed=0, epoch=0
    )[:, 0]
    for one_pass in indices.reshape(1000, 8):
        assert len(set(one_pass)) == 8 and set(one_pass) <= set(part)
    # 8 of 11 images per pass: 727 of 1000, +- 14.
    assert abs(np.bincount(indices.ravel() - 100) - 8000 / 11).max() < 56


def test_batches_depend_on_seed_epoch_and_client_only() -> None:
    parts = split(num_clients=10)

    def epoch(cohort: Sequence[int], **position: int) -> np.ndarray:
        position = dict(seed=0, epoch=0) | position
        return epoch_indices(parts, np.array(cohort), batch_sizes=batch_sizes(10, 4), steps=20, **position)

    everyone = epoch(range(10))
    np.testing.assert_array_equal(epoch([2, 7]), everyone[:, [2, 7]])
    np.testing.assert_array_equal(epoch(range(10)), everyone)
    assert not np.array_equal(epoch(range(10), epoch=1), everyone)
    assert not np.array_equal(epoch(range(10), seed=1), everyone)
    same_images = [parts[0], parts[0]]
    two = epoch_indices(
        same_images, np.array([0, 1]), batch_sizes=batch_sizes(2, 4), steps=20, seed=0, epoch=0
    )
    assert not np.array_equal(two[:, 0], two[:, 1])


def test_a_client_without_a_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size: found 4, allowed: 1 to 3 \(the smallest of 1"):
        epoch_indices(
            [np.arange(9), np.arange(3)],
            np.array([1]),
            batch_sizes=batch_sizes(2, 4),
            steps=1,
            seed=0,
            epoch=0,
        )


def test_a_thousand_clients_are_split_quickly() -> None:
    parts = split(np.repeat(np.arange(10), 5000), num_clients=1000, batch_size=1, noniid_ratio=0.2)
    times = []
    for epoch in range(5):
        start = time.process_time()
        epoch_indices(parts, np.arange(1000), batch_sizes=batch_sizes(1000, 1), steps=50, seed=0, epoch=epoch)
        times.append(time.process_time() - start)
    assert min(times) < 0.1


# --- rich and poor clients

RICH = Rich(clients=4, data_fraction=0.8, batch_factor=16)


@pytest.mark.parametrize(
    ("fields", "parts_crc", "indices_crc"),
    [
        ({}, 4197341792, 3167124142),
        ({"noniid_ratio": 0.2}, 1480192093, 3405570777),
        ({"dirichlet_alpha": 0.5}, 1132311718, 2235736354),
    ],
    ids=str,
)
def test_equal_clients_draw_the_same_as_before_rich_clients_existed(
    fields: dict[str, Any], parts_crc: int, indices_crc: int
) -> None:
    # Values from commit cf28d1c, so that its runs can be repeated.
    parts = split(**fields)
    cohort = sample_cohort(20, 5, seed=0, epoch=3)
    indices = epoch_indices(parts, cohort, batch_sizes=batch_sizes(20, 4), steps=60, seed=0, epoch=3)
    assert zlib.crc32(np.concatenate(parts).astype("<i4").tobytes()) == parts_crc
    assert cohort.tolist() == [5, 8, 10, 11, 17]
    assert zlib.crc32(indices.astype("<i4").tobytes()) == indices_crc


@pytest.mark.parametrize("labels", [BALANCED, UNBALANCED], ids=["balanced", "unbalanced"])
@pytest.mark.parametrize("rich", [RICH, Rich(1, 0.29, 3), Rich(19, 0.999, 1), Rich(7, 0.5, 2)], ids=str)
@pytest.mark.parametrize("fields", [{}, {"noniid_ratio": 0.2}, {"dirichlet_alpha": 0.05}], ids=str)
def test_rich_clients_hold_their_fraction_of_every_class(
    labels: np.ndarray, rich: Rich, fields: dict[str, Any]
) -> None:
    for seed in range(2):
        parts = split(labels, rich=rich, seed=seed, **fields)
        assert len(parts) == 20 and all(part.dtype == np.int32 for part in parts)
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
        for part, size in zip(parts, batch_sizes(20, 4, rich), strict=True):
            assert len(part) >= size == (4 * rich.batch_factor if size != 4 else 4)
        first = np.concatenate(parts[: rich.clients])
        assert len(first) == round(rich.data_fraction * len(labels))
        wanted = rich.data_fraction * np.bincount(labels)
        assert abs(np.bincount(labels[first]) - wanted).max() < 1
        for part, again in zip(parts, split(labels, rich=rich, seed=seed, **fields), strict=True):
            np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("labels", [BALANCED, UNBALANCED], ids=["balanced", "unbalanced"])
def test_each_group_is_dealt_by_the_scheme(labels: np.ndarray) -> None:
    iid = split(labels, rich=RICH)
    for group, images in ((iid[:4], 4800), (iid[4:], 1200)):
        sizes = {len(part) for part in group}
        assert max(sizes) - min(sizes) <= 1 and sum(map(len, group)) == images
    shards = split(labels, noniid_ratio=0.3, rich=RICH)
    assert [len(np.unique(labels[part])) <= 3 for part in shards] == [True] * 20
    uneven = histograms(split(labels, dirichlet_alpha=0.05, rich=RICH), labels)
    assert np.median(uneven.max(axis=1) / uneven.sum(axis=1)) > 0.4


def test_small_classes_are_rounded_to_the_right_total() -> None:
    labels = np.arange(10)  # 0.3 images per class
    parts = split(labels, num_clients=4, batch_size=1, rich=Rich(2, 0.3, 1))
    assert [sum(map(len, parts[:2])), sum(map(len, parts[2:]))] == [3, 7]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rich": Rich(0, 0.8, 2)}, "rich.clients: found 0, allowed"),
        ({"rich": Rich(20, 0.8, 2)}, "rich.clients: found 20, allowed: less than 20, num_clients"),
        ({"rich": Rich(4, 0.0, 2)}, "rich.data_fraction: found 0.0, allowed"),
        ({"rich": Rich(4, 1.0, 2)}, "rich.data_fraction: found 1.0, allowed"),
        ({"rich": Rich(4, float("nan"), 2)}, "rich.data_fraction: found nan, allowed"),
        ({"rich": Rich(4, 0.8, 0)}, "rich.batch_factor: found 0, allowed"),
        ({"rich": Rich(4, 0.1, 40)}, "each of the 4 rich clients takes 640 images: they hold 600"),
        ({"rich": Rich(4, 0.99, 2)}, "each of the 16 poor clients takes 64 images: they hold 60"),
        (
            {"rich": Rich(10, 0.8, 100), "noniid_ratio": 0.1, "labels": UNBALANCED},
            "batch_size: found 4, with rich_batch 100, and the smallest of 10 rich clients holds ",
        ),
    ],
    ids=str,
)
def test_impossible_rich_clients_say_why_in_one_line(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as raised:
        split(**fields)
    assert named in str(raised.value) and "\n" not in str(raised.value)


def test_cohorts_have_the_same_number_of_rich_in_every_epoch() -> None:
    rich = Rich(6, 0.8, 16)
    drawn = np.stack([sample_cohort(30, 10, seed=0, epoch=epoch, rich=rich) for epoch in range(1000)])
    assert drawn.dtype == np.int32 and (np.diff(drawn, axis=1) > 0).all()
    assert (drawn[:, :2] < 6).all() and (drawn[:, 2:] >= 6).all()
    # 2 of 6 and 8 of 24: each client is drawn 333 times, +- 15.
    assert abs(np.bincount(drawn.ravel(), minlength=30) - 1000 / 3).max() < 60
    np.testing.assert_array_equal(sample_cohort(30, 30, seed=0, epoch=0, rich=rich), np.arange(30))


def test_every_cohort_has_a_rich_client_and_room_for_a_poor_client() -> None:
    assert rich_in_cohort(30, 10, None) == 0
    for num_clients in range(2, 9):
        for clients in range(1, num_clients):
            rich = Rich(clients, 0.5, 2)
            for cohort in range(1, num_clients + 1):
                few = rich_in_cohort(num_clients, cohort, rich)
                assert few == int(
                    (sample_cohort(num_clients, cohort, seed=1, epoch=2, rich=rich) < clients).sum()
                )
                assert 1 <= few <= clients and cohort - few <= num_clients - clients
                assert cohort == 1 or few < cohort
                assert abs(few - cohort * clients / num_clients) <= 1


def test_batches_of_unequal_clients() -> None:
    parts = split(rich=RICH)
    sizes = batch_sizes(20, 4, RICH)
    assert sizes.dtype == np.int32 and sizes.tolist() == [64] * 4 + [4] * 16
    assert steps_per_epoch(parts, sizes) == 19  # 6,000 images at 320 per step: 18.75
    cohort = np.array([1, 3, 4, 19])
    indices = epoch_indices(parts, cohort, batch_sizes=sizes, steps=40, seed=0, epoch=0)
    assert indices.shape == (40, 4, 64) and indices.dtype == np.int32
    for place, client in enumerate(cohort):
        size = sizes[client]
        own = indices[:, place, :size]
        assert np.isin(own, parts[client]).all()
        batches = len(parts[client]) // size
        for start in range(0, 40 // batches * batches, batches):  # no image is repeated within a pass
            one_pass = own[start : start + batches].ravel()
            assert len(set(one_pass)) == len(one_pass)
        np.testing.assert_array_equal(indices[:, place, size:], np.repeat(own[:, :1], 64 - size, axis=1))
    # A client draws the same images as in a pool where all have its batch size.
    alike = epoch_indices(parts, cohort[2:], batch_sizes=batch_sizes(20, 4), steps=40, seed=0, epoch=0)
    np.testing.assert_array_equal(indices[:, 2:, :4], alike)
    with pytest.raises(UserError, match=r"found 2000, allowed: 1 to 1200 \(the smallest of 2"):
        epoch_indices(
            parts, cohort, batch_sizes=batch_sizes(20, 4, Rich(4, 0.8, 500)), steps=1, seed=0, epoch=0
        )
