"""All attackers on one client, and the figures of a result."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from mocosfl_jax.algorithm.noise import Noise
from mocosfl_jax.errors import UserError
from mocosfl_jax.models.forms import CPU
from mocosfl_jax.privacy import attacks, report
from mocosfl_jax.privacy.attacks import Result, Settings

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SIZE = 8


def halved(images: jax.Array) -> jax.Array:
    """A client that sends the means of 2x2 pixels."""
    n = len(images)
    return images.reshape(n, SIZE // 2, 2, SIZE // 2, 2, 3).mean((2, 4))


def blind(images: jax.Array) -> jax.Array:
    return 0 * halved(images)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Each has four blocks of one colour, so that `halved` loses nothing."""
    colours = np.random.default_rng(0).integers(0, 256, (90, 2, 2, 3), np.uint8)
    return colours.repeat(SIZE // 2, axis=1).repeat(SIZE // 2, axis=2)


@pytest.fixture(scope="module")
def results(images: np.ndarray) -> list[Result]:
    settings = Settings(epochs=2, decoder="custom", optimised=3, steps=60, seeds=2)
    attackers = ("trivial", "ridge", "strong", "optimisation")
    return attacks.attack(
        {"query": halved, "key": blind},
        images,
        images[:12],
        MEAN,
        STD,
        settings=settings._replace(attackers=attackers),
        forms=CPU,
    )


def test_every_attacker_has_its_rows(results: list[Result]) -> None:
    found = [(r.attacker, r.smashed, r.images, *r.mse.shape) for r in results]
    assert found == [
        ("constant colour", "", None, 1, 12),
        ("own mean colour", "", None, 1, 12),
        ("means of 4x4 blocks", "", None, 1, 12),
        ("ridge", "query", 78, 2, 12),
        ("ridge", "key", 78, 2, 12),
        ("strong decoder", "query", 78, 2, 12),
        ("strong decoder", "key", 78, 2, 12),
        ("optimisation", "query", None, 1, 3),
        ("optimisation", "key", None, 1, 3),
    ]


def test_open_smashed_data_are_inverted_and_blind_ones_are_not(results: list[Result]) -> None:
    rows = {(r.attacker, r.smashed): r.summary() for r in results}
    assert rows["constant colour", ""]["relative_mse"] == 1
    assert rows["means of 4x4 blocks", ""]["mse"] == pytest.approx(0, abs=1e-12)
    assert rows["ridge", "query"]["relative_mse"] < 0.02
    assert rows["ridge", "key"]["relative_mse"] == pytest.approx(1, abs=0.05)
    assert rows["optimisation", "query"]["relative_mse"] < 0.05
    assert rows["optimisation", "key"]["relative_mse"] == pytest.approx(1, abs=0.05)


def test_the_constant_is_the_colour_of_the_attackers_images(images: np.ndarray) -> None:
    """Not that by which the client normalises, which may come from other images."""
    dark = images // 4
    (result, *_) = attacks.attack(
        {"query": halved},
        dark,
        dark[:12],
        MEAN,
        STD,
        settings=Settings(attackers=("trivial",)),
        forms=CPU,
    )
    colour = np.mean(dark[12:] / 255, axis=(0, 1, 2))
    expected = np.mean((dark[:12] / 255 - colour) ** 2)
    assert expected < 0.1 * np.mean((dark[:12] / 255 - MEAN) ** 2)
    assert result.constant_mse == pytest.approx(expected, rel=1e-5)
    assert result.summary()["relative_mse"] == pytest.approx(1)
    np.testing.assert_allclose(result.shown[0, 0, 0], colour, rtol=1e-5)


def test_noise_on_smashed_data_hides(images: np.ndarray) -> None:
    """Ridge regression, which is the best linear guess, against its error in closed form."""

    def relative(std: float) -> float:
        found = attacks.attack(
            {"query": halved},
            images,
            images[:12],
            MEAN,
            STD,
            settings=Settings(attackers=("ridge",), seeds=4),
            forms=CPU,
            noise=Noise(jax.random.key(0), std=std, clip=10.0) if std else None,
        )
        return float(found[0].summary()["relative_mse"])

    clean, little, much = relative(0.0), relative(0.05), relative(1.0)
    # Four colours are sent four times each, with a variance of 16 / 12 around the mean and noise of 10 std.
    signal = 16 / 12
    assert clean < 0.02
    for found, std in ((little, 0.05), (much, 1.0)):
        noise = (10 * std) ** 2 / 4
        assert found == pytest.approx(noise / (noise + signal), abs=0.15)


def test_the_smashed_data_of_the_victims_have_noise_of_their_own(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[np.ndarray] = []

    def ridge(rngs: jax.Array, smashed: np.ndarray, targets: np.ndarray, victims: np.ndarray) -> np.ndarray:
        given.append(victims)
        return np.zeros((2, 12, SIZE, SIZE, 3), np.float32)

    monkeypatch.setattr(attacks, "ridge", ridge)
    attacks.attack(
        {"query": halved, "key": halved},
        images,
        images[:12],
        MEAN,
        STD,
        settings=Settings(attackers=("ridge",)),
        forms=CPU,
        noise=Noise(jax.random.key(0), std=0.5, clip=10.0),
    )
    clean = (images[:12, ::2, ::2] / 255 - 0.5) / 0.25
    drawn = given[0] - clean
    for view in drawn:
        assert np.std(view) == pytest.approx(0.5 * 10, rel=0.1)  # of 576 draws
        assert np.mean(view) == pytest.approx(0, abs=1)
    assert abs(np.corrcoef(*drawn.reshape(2, -1))[0, 1]) < 0.2


def test_the_smashed_data_of_all_seeds_and_views_are_bounded(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 78 images with 48 float32 numbers each, 30 for each of two views and two seeds."""
    monkeypatch.setattr(attacks, "SMASHED_BYTES", 30 * 48 * 4 * 4)
    drawn: list[int] = []

    def draw(self: attacks.Stacked, count: int) -> tuple[Any, ...]:
        found = original(self, count)
        drawn.append(found[1].nbytes)
        return found

    original = attacks.Stacked.draw
    monkeypatch.setattr(attacks.Stacked, "draw", draw)
    results = attacks.attack(
        {"query": halved, "key": blind},
        images,
        images[:12],
        MEAN,
        STD,
        settings=Settings(attackers=("strong",), decoder="custom", epochs=1, seeds=2),
        forms=CPU,
    )
    assert drawn == [attacks.SMASHED_BYTES]
    assert [result.images for result in results] == [30, 30]


def test_a_summary_is_over_victims_and_seeds() -> None:
    mse = np.array([[0.1, 0.2, 0.3], [0.2, 0.3, 0.7]])
    row = Result("a", "query", 5, mse, 1 - mse, -mse, 0.6, np.zeros((1, 4, 4, 3))).summary()
    assert row["mse"] == pytest.approx(0.3) and row["relative_mse"] == pytest.approx(0.5)
    assert row["mse_std"] == pytest.approx(np.std([0.2, 0.4], ddof=1))
    # Linear interpolation between the smallest and the next: a tenth of the way.
    assert row["mse_5th_percentile"] == pytest.approx((0.11 + 0.21) / 2)
    assert (row["victims"], row["seeds"], row["images"]) == (3, 2, 5)


def test_the_table_has_a_line_for_each_result(results: list[Result]) -> None:
    title, *lines = report.table(results).splitlines()
    assert title.split() == ["attacker", "smashed", "images", "MSE", "SSIM", "PSNR", "MSE/const", "MSE", "p5"]
    assert len(lines) == len(results)
    assert lines[0].split()[:5] == ["constant", "colour", "-", "-", f"{results[0].mse.mean():.4f}"]
    assert lines[-1].startswith("optimisation (3 victims)")


def test_the_picture_has_the_victims_above(tmp_path: Path, images: np.ndarray, results: list[Result]) -> None:
    path = tmp_path / "reconstructions.png"
    report.draw_reconstructions(path, images[:12], {"a $client_{0": results})
    picture = np.asarray(Image.open(path).convert("RGB"))
    colour = images[0, 0, 0].astype(int)
    near = (np.abs(picture.astype(int) - colour).max(-1) < 3).nonzero()
    rows = len(results) + 1
    # The first victim's first block: in the first row, and again in that of the block means.
    assert near[0].min() < picture.shape[0] / rows
    assert len(near[0]) > 20
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attackers": ("trivial", "magic")}, r"--attackers: found 'magic', allowed: trivial, ridge"),
        ({"protocol": "dirty"}, r"--protocol: found 'dirty', allowed: clean, official"),
        ({"decoder": "gan"}, r"decoder: found 'gan', allowed: res_norm"),
        ({"images": 19}, r"attacker's images: found 19 of 78 training images, allowed: 20 or more"),
        ({"protocol": "official"}, r"attacker's images: found 1 of 90 training images"),
    ],
)
def test_impossible_settings_are_refused(images: np.ndarray, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attacks.attack(
            {"query": halved}, images, images[:12], MEAN, STD, settings=Settings(**changes), forms=CPU
        )


def test_attackers_without_a_decoder_attack_what_no_decoder_fits(images: np.ndarray) -> None:
    """Nor do those without images need any."""

    def thirds(x: jax.Array) -> jax.Array:
        return x[:, ::3, ::3]

    given: Any = ({"query": thirds}, images, images[:3], MEAN, STD)
    with pytest.raises(UserError, match="decoder"):
        attacks.attack(*given, settings=Settings(attackers=("strong",)), forms=CPU)
    found = attacks.attack(*given, settings=Settings(attackers=("trivial", "ridge")), forms=CPU)
    assert "ridge" in {result.attacker for result in found}
    few = ({"query": thirds}, images[:8], images[:3], MEAN, STD)
    alone = Settings(attackers=("optimisation",), steps=2)
    (result,) = attacks.attack(*few, settings=alone, forms=CPU)
    assert result.attacker == "optimisation"


def test_the_official_protocol_trains_as_the_official_code(
    images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict = {}

    def train(rngs, smashed, targets, *, decoder, training, forms, each_epoch):  # type: ignore[no-untyped-def]
        seen.update(targets=targets, training=training)
        raise KeyboardInterrupt

    monkeypatch.setattr("mocosfl_jax.privacy.inversion.train_decoder", train)
    many = np.tile(images, (25, 1, 1, 1))  # 2,250, of which the attacker has 22 or 23
    settings = Settings(attackers=("official",), protocol="official")
    with pytest.raises(KeyboardInterrupt):
        attacks.attack({"query": halved}, many, images[:12], MEAN, STD, settings=settings, forms=CPU)
    assert seen["targets"].shape == (1, 22, SIZE, SIZE, 3)
    assert seen["training"] == (50, 32, 1e-3, False, 0.1, True, "mse")
