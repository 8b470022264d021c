"""The pictures of the features show the nearest images, right frames, and every class of the chosen ones."""

import pathlib
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mocosfl_jax.data import Dataset
from mocosfl_jax.data.images import OnDisk
from mocosfl_jax.evaluation.features import Extracted
from mocosfl_jax.evaluation.knn import nearest
from mocosfl_jax.pictures import embedding, figure, neighbours
from mocosfl_jax.pictures.features import plot_features
from mocosfl_jax.pictures.figure import class_colours

CLASSES = ("$a$", "<b>", "a very long name of a class")
COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c"]


def make(train: int = 60, test: int = 30) -> tuple[Dataset, Extracted, Extracted]:
    """Images of one colour each, which is different for each image, and random features."""
    rng = np.random.default_rng(1)
    colours = rng.permutation(250)[: train + test].astype(np.uint8)
    images = np.broadcast_to(colours[:, None, None, None], (train + test, 4, 4, 3)).copy()
    labels = np.arange(train + test) % len(CLASSES)
    dataset = Dataset(
        x_train=images[:train],
        y_train=labels[:train],
        x_test=images[train:],
        y_test=labels[train:],
        class_names=CLASSES,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        source="here",
    )
    features = rng.normal(size=(train + test, 6)).astype(np.float32)
    return (
        dataset,
        Extracted(features[:train], features[:train]),
        Extracted(features[train:], features[train:]),
    )


def loop(train: np.ndarray, row: np.ndarray, k: int) -> list[int]:
    """The k nearest by cosine similarity, the most similar first."""
    cosines = [float(np.dot(each, row) / np.linalg.norm(each) / np.linalg.norm(row)) for each in train]
    return sorted(range(len(train)), key=lambda index: -cosines[index])[:k]


def test_nearest_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(50, 7)), rng.normal(size=(9, 7))
    assert nearest(train, test, 8).tolist() == [loop(train, row, 8) for row in test]


def test_images_are_spread_over_classes() -> None:
    labels = np.repeat([5, 1, 3], [20, 1, 20])
    assert neighbours.spread_over_classes(labels, 6).tolist() == [20, 21, 22, 23, 0, 1]
    many = np.arange(100)[::-1]
    chosen = many[neighbours.spread_over_classes(many, 12)]
    assert len(chosen) == 12 and chosen[0] == 0 and chosen[-1] == 99
    assert np.diff(chosen).min() >= 8
    assert neighbours.spread_over_classes(np.array([1, 0]), 12).tolist() == [1, 0]


def test_the_picture_has_these_images_with_the_right_frames(
    tmp_path: pathlib.Path, said: list[str], drawn: list[Figure]
) -> None:
    dataset, train, test = make()
    neighbours.plot_neighbours(tmp_path / "neighbours.png", dataset, train.backbone, test.backbone)
    assert said == []
    axes = drawn[0].axes[0]
    shown = iter(axes.images)
    frames = iter(patch for patch in axes.patches if isinstance(patch, Rectangle))
    names = iter(axes.texts)
    with Image.open(tmp_path / "neighbours.png") as file:
        pixels = np.asarray(file.convert("RGB"))

    def pixel(x: float, y: float) -> tuple[int, ...]:
        across, up = axes.transData.transform((x, y)) * 120 / drawn[0].dpi
        return tuple(pixels[int(len(pixels) - up), int(across)].tolist())

    chosen = neighbours.spread_over_classes(dataset.y_test, 12)
    assert sorted(dataset.y_test[chosen].tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    expected = {"same": 0, "other": 0}
    for query in chosen:
        near = loop(train.backbone, test.backbone[query], 8)
        row = [(dataset.x_test[query], dataset.y_test[query])]
        row += [(dataset.x_train[index], dataset.y_train[index]) for index in near]
        for place, (image, number) in enumerate(row):
            left, right, bottom, top = next(shown).get_extent()
            assert pixel((left + right) / 2, (top + bottom) / 2) == (int(image[0, 0, 0]),) * 3
            name = next(names)
            assert name.get_text() == figure.label(CLASSES[number], 13) and not name.get_parse_math()
            same = number == dataset.y_test[query]
            expected["same" if same else "other"] += 1
            frame = next(frames)
            assert line_colour(frame) == COLOURS[number]
            assert frame.get_linestyle() == (neighbours.SAME_CLASS if same else neighbours.OTHER_CLASS)
            if not place:
                found = pixel(left, (top + bottom) / 2)
                assert "#" + bytes(found).hex() == COLOURS[number]
    assert next(frames, None) is None
    assert min(expected.values()) > 10
    (legend,) = drawn[0].legends
    handles: Any = legend.legend_handles
    assert [handle.get_label() for handle in handles] == ["class of the test image", "another class"]


def test_up_to_twenty_classes_have_colours_of_their_own() -> None:
    few = figure.class_colours([0, 2], 3)
    assert few[2] == figure.class_colours([2], 3)[2] != few[0]
    twenty = figure.class_colours(range(20), 20)
    assert len(set(twenty.values())) == 20
    assert list(figure.class_colours([5, 70, 900], 1000)) == [5, 70, 900]
    assert len(set(figure.class_colours(range(50), 1000).values())) == 50


def line_colour(patch: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(patch.get_edgecolor())


def test_only_the_shown_images_are_read(tmp_path: pathlib.Path, said: list[str]) -> None:
    dataset, train, test = make(train=200, test=40)
    read: set[int] = set()

    def on_disk(images: np.ndarray, first: int) -> OnDisk:
        def some(indices: np.ndarray) -> np.ndarray:
            read.update((first + indices).tolist())
            return images[indices]

        def whole() -> np.ndarray:
            raise AssertionError("all images are read")

        return OnDisk(images.shape, some, whole)

    streamed = dataset._replace(
        x_train=on_disk(dataset.x_train[:], 0), x_test=on_disk(dataset.x_test[:], 1000)
    )
    assert plot_features(tmp_path, streamed, (train, test), "_b") == ["neighbours_b.png", "embedding_b.png"]
    chosen = neighbours.spread_over_classes(dataset.y_test, 12)
    shown = {index for query in chosen for index in loop(train.backbone, test.backbone[query], 8)}
    assert read == shown | {1000 + int(index) for index in chosen}
    assert said == []


def test_every_class_of_the_embedding_is_in_its_legend(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its own colour, also if its name starts with `_`, by which matplotlib marks what it leaves out."""
    legends: list[Any] = []

    def keep(path: pathlib.Path, size: Any, draw: Any) -> None:
        canvas = Figure(figsize=size)
        draw(canvas)
        legends.extend(canvas.legends)

    monkeypatch.setattr(embedding, "save", keep)
    rows = np.random.default_rng(0).normal(size=(60, 5))
    embedding.plot_embedding(tmp_path / "e.png", rows, np.arange(60) % 3, ("_other", "cat", "dog"))
    (legend,) = legends
    assert [text.get_text() for text in legend.get_texts()] == ["_other", "cat", "dog"]
    colours = [tuple(handle.get_facecolor()[0]) for handle in legend.legend_handles]
    wanted = class_colours([0, 1, 2], 3)
    assert colours == [to_rgba(wanted[number]) for number in range(3)]


def test_the_embedding_separates_what_is_far_apart_and_repeats(
    tmp_path: pathlib.Path, said: list[str], drawn: list[Figure]
) -> None:
    labels = np.arange(90) % 3
    rows = np.eye(8)[labels] + 0.05 * np.random.default_rng(0).normal(size=(90, 8))
    # Length must not count.
    rows *= np.random.default_rng(1).uniform(0.1, 10, (90, 1))
    places = embedding.embed(rows)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + np.diag([np.inf] * 90)
    assert np.mean(labels[distances.argmin(axis=1)] == labels) == 1.0
    np.testing.assert_array_equal(embedding.embed(rows), places)

    embedding.plot_embedding(tmp_path / "embedding.png", rows, labels, CLASSES)
    assert said == []
    found: list[Any] = list(drawn[0].axes[0].collections)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == list(CLASSES)
    assert not any(text.get_parse_math() for text in legend.get_texts())
    handles: list[Any] = list(legend.legend_handles)
    assert len({tuple(handle.get_facecolor()[0]) for handle in handles}) == len(found) == 3
    for number, (handle, points) in enumerate(zip(handles, found, strict=True)):
        assert tuple(handle.get_facecolor()[0]) == tuple(points.get_facecolor()[0])
        np.testing.assert_allclose(points.get_offsets(), places[labels == number], rtol=1e-6)


def test_few_colours_and_few_images() -> None:
    labels = np.arange(5000) % 100
    rows, classes = embedding.chosen(labels)
    assert len(classes) == 20 and set(labels[rows]) == set(classes) and len(rows) == 1000
    assert {0, 99} <= set(classes.tolist())
    rows, classes = embedding.chosen(np.arange(50_000) // 5000)
    assert np.bincount((np.arange(50_000) // 5000)[rows]).tolist() == [100] * 10


def test_pictures_that_cannot_be_drawn_are_a_line_each(tmp_path: pathlib.Path, said: list[str]) -> None:
    dataset, train, test = make()
    collapsed = Extracted(np.ones_like(test.backbone), test.projection)
    assert plot_features(tmp_path, dataset, (train, collapsed)) == ["neighbours.png"]
    dataset, train, test = make(train=3, test=3)
    (tmp_path / "few").mkdir()
    assert plot_features(tmp_path / "few", dataset, (train, test)) == ["neighbours.png"]
    assert said == [
        f"{tmp_path}/embedding.png is not drawn (ValueError: the features of all images are equal)",
        f"{tmp_path}/few/embedding.png is not drawn (ValueError: found 3 images, allowed: 4 or more)",
    ]
    broken = dataset._replace(x_train=dataset.x_train[:0])
    assert plot_features(tmp_path / "nowhere", broken, (train, test)) == []
    assert len(said) == 4
